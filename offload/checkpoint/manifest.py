"""The JSON manifest beside an expert file: what is in it and where. Standard library only.

docs/formats.md describes both files.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offload.config import DENSE_FORMATS
from offload.errors import ExpertFileError

FORMAT_VERSION = 2
_READABLE = (1, 2)  # version 1 had no errors
RECORD_ALIGNMENT = 4096  # O_DIRECT wants offsets, lengths and addresses in blocks; 4 KiB serves every disk
MANIFEST_NAME = "manifest.json"
EXPERT_FILE_NAME = "experts.bin"
DENSE_FILE_NAMES = {name: f"dense-{name}.safetensors" for name in DENSE_FORMATS if name != "native"}


def align(offset: int, alignment: int) -> int:
    """``offset`` rounded up to a multiple of ``alignment``."""
    return -(-offset // alignment) * alignment


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """One tensor inside a record. ``offset`` and ``bytes`` count from the start of the record."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class RecordLayout:
    record_bytes: int
    tensors: tuple[TensorLayout, ...]


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """The records of one MoE layer: ``experts`` of them, back to back from ``offset`` in the expert file.

    ``layout`` indexes :attr:`Manifest.layouts`; ``path`` is the experts module's name in the model.
    """

    layer: int
    path: str
    experts: int
    layout: int
    offset: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """``checksums`` holds one CRC-32 a record, in file order. ``fingerprint`` identifies the checkpoint.

    ``errors`` holds, in the order of ``layers``, the root mean square error of the experts' quantised weights relative
    to the weights' own root mean square; None where nothing is quantised or the pack does not say.
    """

    model: str
    revision: str | None
    model_type: str
    format: str
    fingerprint: str
    layouts: tuple[RecordLayout, ...]
    layers: tuple[LayerLayout, ...]
    checksums: tuple[int, ...]
    errors: tuple[float | None, ...]
    format_version: int = FORMAT_VERSION

    @property
    def num_records(self) -> int:
        return sum(layer.experts for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        """Size of the expert file."""
        return sum(layer.experts * self.layouts[layer.layout].record_bytes for layer in self.layers)

    @property
    def slot_bytes(self) -> int:
        """Bytes of the largest record: the size of a slot."""
        return max(layout.record_bytes for layout in self.layouts)

    def bytes_of(self, records: int) -> int:
        """Size of the first ``records`` records of the expert file."""
        size = 0
        for layer in self.layers:
            count = min(records, layer.experts)
            size += count * self.layouts[layer.layout].record_bytes
            records -= count
        return size

    def write(self, folder: Path) -> None:
        """Write the manifest into ``folder`` and wait until it is on the disk."""
        with open(folder / MANIFEST_NAME, "w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self), indent=1))
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check a manifest. Raises ExpertFileError for a damaged one or one of another version."""
        path = folder / MANIFEST_NAME
        remedy = "remove this folder and pack the model again"
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version = data["format_version"]
            if version not in _READABLE or isinstance(version, bool):
                raise ExpertFileError(
                    f"{path}: written by another version of run-local (manifest version {version}, this one reads "
                    f"{_READABLE[0]} to {_READABLE[-1]}); {remedy}"
                )
            if version == 1:
                data.setdefault("errors", [None] * len(data["layers"]))
            data["layouts"] = tuple(
                RecordLayout(
                    layout["record_bytes"],
                    tuple(TensorLayout(**(t | {"shape": tuple(t["shape"])})) for t in layout["tensors"]),
                )
                for layout in data["layouts"]
            )
            data["layers"] = tuple(LayerLayout(**layer) for layer in data["layers"])
            data["checksums"] = tuple(data["checksums"])
            data["errors"] = tuple(data["errors"])
            manifest = cls(**data)
            manifest._check()
        except FileNotFoundError:
            raise ExpertFileError(f"{folder}: there is no pack here (no {MANIFEST_NAME})") from None
        except OSError as error:
            raise ExpertFileError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ExpertFileError(f"{path}: the manifest is damaged ({error}); {remedy}") from error
        return manifest

    def _check(self) -> None:
        """Raises ValueError if the parts do not fit each other: record bounds, order, alignment, counts."""
        end = 0
        for layer in self.layers:
            layout = self.layouts[layer.layout]
            if layer.offset != end or layer.experts < 1 or layer.layout < 0:
                raise ValueError(f"layer {layer.layer} does not start where the one before ends")
            end += layer.experts * layout.record_bytes
        for layout in self.layouts:
            if layout.record_bytes <= 0 or layout.record_bytes % RECORD_ALIGNMENT:
                raise ValueError(f"record size {layout.record_bytes} is no multiple of {RECORD_ALIGNMENT}")
            for tensor in layout.tensors:
                if min(tensor.offset, tensor.bytes) < 0 or tensor.offset + tensor.bytes > layout.record_bytes:
                    raise ValueError(f"tensor {tensor.name} lies outside its record")
        if len({layer.layer for layer in self.layers}) < len(self.layers):
            raise ValueError("two entries for one layer")
        if not self.layers or len(self.checksums) != self.num_records:
            raise ValueError(f"{len(self.checksums)} checksums for {self.num_records} records")
        if len(self.errors) != len(self.layers):
            raise ValueError(f"{len(self.errors)} errors for {len(self.layers)} layers")
        for error in self.errors:
            if error is not None and not (isinstance(error, float | int) and 0 <= error < math.inf):
                raise ValueError(f"an error of {error}")
