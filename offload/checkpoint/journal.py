"""The journal of a pack that is not complete yet: the layers that are safely on disk.

Its first line says what is packed, each further line has the checksums and the error of a layer, in file order.
Standard library only.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from offload.checkpoint.manifest import EXPERT_FILE_NAME, Manifest

JOURNAL_NAME = "journal.jsonl"
PARTIAL_SUFFIX = ".partial"


class PackedLayer(NamedTuple):
    """A layer that is safely on disk: CRC-32 of its records, and what the manifest says of its error."""

    checksums: tuple[int, ...]
    error: float | None

    def to_json(self) -> dict[str, Any]:
        return {"checksums": self.checksums, "error": self.error}


def resumable(partial: Path, manifest: Manifest) -> list[PackedLayer]:
    """The layers that an earlier try left safely on disk; removes a partial pack of something else."""
    layers: list[PackedLayer] = []
    try:
        with open(partial / JOURNAL_NAME, encoding="utf-8") as journal:
            if json.loads(journal.readline()) != _identity(manifest):
                raise ValueError("another model, format or version")
            for line in journal:
                if line.endswith("\n"):  # a torn last line does not count
                    layers.append(_packed_layer(json.loads(line)))
        planned = manifest.layers[: len(layers)]
        if [len(layer.checksums) for layer in layers] != [layer.experts for layer in planned]:
            raise ValueError("other layers than planned")
        on_disk = (partial / EXPERT_FILE_NAME).stat().st_size if layers else 0
        if manifest.bytes_of(sum(layer.experts for layer in planned)) > on_disk:
            raise ValueError("more checksums than records on disk")
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError, OSError):
        shutil.rmtree(partial, ignore_errors=True)
        return []
    return layers


def start_journal(partial: Path, manifest: Manifest, layers: list[PackedLayer]) -> TextIO:
    """A journal that says ``layers`` and is open for more. An earlier one is replaced: its end may be torn."""
    draft = partial / f"{JOURNAL_NAME}.new"
    journal = open(draft, "w", encoding="utf-8")  # noqa: SIM115 - returned
    try:
        append(journal, _identity(manifest))
        for layer in layers:
            append(journal, layer.to_json())
        os.replace(draft, partial / JOURNAL_NAME)
    except BaseException:
        journal.close()
        raise
    return journal


def append(journal: TextIO, value: object) -> None:
    """Write one line and hand it to the system, so that it outlives this process."""
    journal.write(json.dumps(value) + "\n")
    journal.flush()


def _identity(manifest: Manifest) -> dict[str, object]:
    """What must be the same for a partial pack to be continued."""
    return {
        "format_version": manifest.format_version,
        "format": manifest.format,
        "fingerprint": manifest.fingerprint,
        "total_bytes": manifest.total_bytes,
    }


def _packed_layer(data: dict[str, Any]) -> PackedLayer:
    """Raises ValueError, TypeError or KeyError for what :meth:`PackedLayer.to_json` does not give."""
    checksums, error = data["checksums"], data["error"]
    if not all(isinstance(checksum, int) for checksum in checksums) or not isinstance(error, float | None):
        raise ValueError("a checksum or an error is no number")
    return PackedLayer(tuple(checksums), error)
