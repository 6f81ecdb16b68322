"""The journal of a pack that is not complete yet: checksums of the records that are safely on disk.

Its first line says what is packed, each further line is a list of CRC-32 in file order. Standard library only.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TextIO

from offload.checkpoint.manifest import EXPERT_FILE_NAME, Manifest

JOURNAL_NAME = "journal.jsonl"
PARTIAL_SUFFIX = ".partial"


def resumable(partial: Path, manifest: Manifest) -> list[int]:
    """Checksums of the records that an earlier try left safely on disk; removes a partial pack of something else."""
    checksums: list[int] = []
    try:
        with open(partial / JOURNAL_NAME, encoding="utf-8") as journal:
            if json.loads(journal.readline()) != _identity(manifest):
                raise ValueError("another model, format or version")
            for line in journal:
                if line.endswith("\n"):  # a torn last line does not count
                    checksums += json.loads(line)
        on_disk = (partial / EXPERT_FILE_NAME).stat().st_size if checksums else 0
        if len(checksums) > manifest.num_records or manifest.bytes_of(len(checksums)) > on_disk:
            raise ValueError("more checksums than records on disk")
        if not all(isinstance(checksum, int) for checksum in checksums):
            raise ValueError("a checksum is no number")
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, OSError):
        shutil.rmtree(partial, ignore_errors=True)
        return []
    return checksums


def start_journal(partial: Path, manifest: Manifest, checksums: list[int]) -> TextIO:
    """A journal that says ``checksums`` and is open for more. An earlier one is replaced: its end may be torn."""
    draft = partial / f"{JOURNAL_NAME}.new"
    journal = open(draft, "w", encoding="utf-8")  # noqa: SIM115 - returned
    try:
        append(journal, _identity(manifest))
        if checksums:
            append(journal, checksums)
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
