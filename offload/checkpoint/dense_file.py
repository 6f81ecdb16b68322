"""The dense file of a pack: matrices of the skeleton with 8 or 4 bits a weight, in a safetensors file.

It is written when it is first needed, part by part under a temporary name, and renamed when it is whole.
docs/formats.md describes it.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from offload.checkpoint.disk import check_space, disk_errors, sync_folder, write_all
from offload.checkpoint.fingerprint import checkpoint_fingerprint
from offload.checkpoint.journal import PARTIAL_SUFFIX
from offload.checkpoint.lock import pack_lock
from offload.checkpoint.manifest import DENSE_FILE_NAMES
from offload.checkpoint.source import CheckpointSource
from offload.compute.kernels import load_kernels
from offload.compute.matrix import MatrixLayout, QuantizedMatrix, empty_matrix, encode
from offload.config import format_size
from offload.errors import ExpertFileError, ModelError
from offload.events import LoadProgress, Notice
from offload.model import transformers_weights as tw
from offload.model.dense import DenseMatrix, find_dense

OnEvent = Callable[[LoadProgress | Notice], None]
DENSE_VERSION = 1
_BLOCK = 4 * 2**20  # weights that are quantised at a time: some tens of MiB with all copies
_REMEDY = "remove this file, and the next start writes it again"
_DTYPES = {torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}  # as safetensors says


class DenseFile:
    """A dense file that fits the model. ``matrices`` are in it, and stand for the checkpoint's tensors ``keys``."""

    def __init__(self, path: Path, matrices: Sequence[DenseMatrix], fingerprint: str) -> None:
        """Reads the header. Raises ExpertFileError if the file is damaged or was made for something else."""
        self.path = path
        self.matrices = tuple(matrices)
        try:
            with safe_open(path, framework="pt", backend="pread"):
                pass  # the library checks that the header makes sense and that the file has the length it tells of
            self._file = open(path, "rb")  # noqa: SIM115 - closed by close
            length = int.from_bytes(self._file.read(8), "little")
            self._entries: dict[str, Any] = json.loads(self._file.read(length))
            self._said: dict[str, str] = self._entries.pop("__metadata__", {})
            self._data = 8 + length
        except (SafetensorError, OSError, ValueError) as error:
            raise ExpertFileError(f"{path}: the file is damaged or incomplete ({error}); {_REMEDY}") from error
        version = self._said.get("format_version")
        if version != str(DENSE_VERSION):
            raise ExpertFileError(
                f"{path}: written by another version of run-local (version {version}, this one reads {DENSE_VERSION}); "
                f"{_REMEDY}"
            )
        if self._said.get("fingerprint") != fingerprint:
            raise ExpertFileError(f"{path}: made from another checkpoint; {_REMEDY}")
        if self._said.get("layouts") != _layouts(self.matrices):
            raise ExpertFileError(f"{path}: laid out for another version or format; {_REMEDY}")
        try:
            self.keys = frozenset(json.loads(self._said["keys"]))
            self._checksums: dict[str, str] = dict(json.loads(self._said["checksums"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ExpertFileError(f"{path}: the header is damaged ({error}); {_REMEDY}") from error

    def read(self, dense: DenseMatrix, on_part: Callable[[int], None]) -> QuantizedMatrix:
        """One matrix, in memory of its own; ``on_part`` is called with the bytes of each part that was read.

        Raises ExpertFileError if it cannot be read or is damaged.
        """
        matrix = empty_matrix(dense.layout)
        for name, tensor in _parts(matrix):
            self._read_into(f"{dense.name}.{name}", tensor, on_part)
        return matrix

    def close(self) -> None:
        """Nothing can be read afterwards."""
        self._file.close()

    def _read_into(self, name: str, tensor: torch.Tensor, on_part: Callable[[int], None]) -> None:
        # not by the library: it would put a whole tensor elsewhere first, and at an address that is not aligned
        rest, checksum = _bytes(tensor), 0
        try:
            entry = self._entries[name]
            if tuple(entry["shape"]) != tensor.shape or entry["dtype"] != _DTYPES[tensor.dtype]:
                raise ValueError(f"{name} has another shape or dtype")
            self._file.seek(self._data + entry["data_offsets"][0])
            while rest:
                count = self._file.readinto(rest[:_BLOCK])
                if not count:
                    raise EOFError("it ends there")
                checksum = zlib.crc32(rest[:count], checksum)
                rest = rest[count:]
                on_part(count)
        except (OSError, KeyError, ValueError, EOFError) as error:
            raise ExpertFileError(f"{self.path}: the file is damaged or incomplete ({error}); {_REMEDY}") from error
        if self._checksums.get(name) != f"{checksum:08x}":
            raise ExpertFileError(f"{self.path}: {name} is damaged (its checksum differs); {_REMEDY}")


def ensure_dense(
    source: CheckpointSource, pack: Path, name: str, dense_format: str, on_event: OnEvent
) -> DenseFile | None:
    """The dense file in the folder ``pack``; writes it, saying so, if there is none. None if there is nothing in it.

    Raises ExpertFileError if the file that is there is damaged or another checkpoint's, if the disk is too small
    (before anything is written), or if another process packs this model now.
    """
    matrices = find_dense(source.model, source.experts, dense_format)
    if not matrices:
        return None
    path = pack / DENSE_FILE_NAMES[dense_format]
    fingerprint = checkpoint_fingerprint(source.folder)
    if not path.exists():
        size = format_size(sum(dense.layout.bytes for dense in matrices))
        on_event(
            Notice(
                f"packing the other weights of {name} as {dense_format} into {path}: {len(matrices)} matrices, {size} "
                "(once; later starts use the file)"
            )
        )
        with pack_lock(pack):
            if not path.exists():  # another process may have written it a moment ago
                write_dense(source, matrices, path, fingerprint, on_event)
    return DenseFile(path, matrices, fingerprint)


def write_dense(
    source: CheckpointSource, matrices: Sequence[DenseMatrix], path: Path, fingerprint: str, on_event: OnEvent
) -> None:
    """Quantise ``matrices`` of ``source`` into a dense file. Memory: a part of a matrix, or one that is converted.

    Raises ModelError if weights are missing or of another shape, ExpertFileError if the disk is too small or a write
    fails; then nothing is left.
    """
    sources, keys = _sort_sources(source, matrices)
    draft = _Draft(matrices, {"fingerprint": fingerprint, "keys": json.dumps(keys)})
    partial = path.with_name(f"{path.name}{PARTIAL_SUFFIX}")
    with disk_errors(path.parent, path):
        check_space(path.parent, draft.total_bytes)
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            draft.write(fd, source, sources, on_event)
            os.fsync(fd)
            os.rename(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        sync_folder(path.parent)
    source.close()


class _Draft:
    """A dense file under way: its header, where each tensor stands, and the checksums so far."""

    def __init__(self, matrices: Sequence[DenseMatrix], said: Mapping[str, str]) -> None:
        self._of = {name: dense for dense in matrices for name in dense.parameters}
        self._checksums: dict[str, int] = {}
        self._offsets: dict[str, int] = {}
        self._entries: dict[str, Any] = {}
        end = 0
        for dense in matrices:
            layout = dense.layout
            for part, shape, dtype in (
                ("codes", layout.codes_shape, layout.codes_dtype),
                ("params", layout.params_shape, layout.params_dtype),
            ):
                name, start = f"{dense.name}.{part}", end
                end += math.prod(shape) * dtype.itemsize
                self._entries[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": (start, end)}
                self._offsets[name] = start
                self._checksums[name] = 0
        self._said = {"format_version": str(DENSE_VERSION), "layouts": _layouts(matrices), **said}
        self._data_bytes = end
        self._header_bytes = len(self._header())

    @property
    def total_bytes(self) -> int:
        return self._header_bytes + self._data_bytes

    def write(
        self, fd: int, source: CheckpointSource, sources: Sequence[tw.ParameterSource], on_event: OnEvent
    ) -> None:
        """Write the data, then the header, whose length does not depend on the checksums in it."""
        kernels = load_kernels()
        rows_of = dict.fromkeys((dense.name for dense in self._of.values()), 0)
        done = 0
        for found in sources:
            for parameter, first, rows in source.read_parameters(found, _BLOCK):
                if (dense := self._of.get(parameter)) is None:
                    continue
                layout = dense.layout
                if rows.dim() != 2 or rows.shape[1] != layout.columns:
                    raise _misfit(source, parameter)
                matrix = empty_matrix(MatrixLayout(len(rows), layout.columns, layout.bits, layout.group))
                encode(rows.to(dense.dtype), matrix, kernels)
                for part, tensor in _parts(matrix):
                    name, data = f"{dense.name}.{part}", _bytes(tensor)
                    row = len(data) // len(rows)
                    write_all(fd, data, self._header_bytes + self._offsets[name] + first * row)
                    self._checksums[name] = zlib.crc32(data, self._checksums[name])
                rows_of[dense.name] += len(rows)
                done += matrix.layout.bytes
                on_event(LoadProgress("pack", min(done, self._data_bytes), self._data_bytes, "bytes"))
        for name, dense in self._of.items():
            if rows_of[dense.name] != dense.layout.rows:
                raise _misfit(source, name)
        write_all(fd, memoryview(self._header()), 0)

    def _header(self) -> bytes:
        checksums = {name: f"{checksum:08x}" for name, checksum in self._checksums.items()}
        said = self._said | {"checksums": json.dumps(checksums)}
        text = json.dumps({"__metadata__": said} | self._entries).encode()
        text += b" " * (-len(text) % 8)  # as the library itself does
        return len(text).to_bytes(8, "little") + text


def _sort_sources(
    source: CheckpointSource, matrices: Sequence[DenseMatrix]
) -> tuple[list[tw.ParameterSource], list[str]]:
    """Where the weights of ``matrices`` come from, each matrix once, and all checkpoint tensors that they stand for.

    Tied weights may stand in the checkpoint under several names; then they must be the same, as the loader wants too.
    """
    dense_of = {name: dense for dense in matrices for name in dense.parameters}
    by_matrix: dict[str, tw.ParameterSource] = {}
    sources, keys = [], []
    for found in source.find_parameters(dense_of.keys()):
        keys += [key for some in found.source.keys.values() for key in some]
        names = [dense_of[name].name for name in found.parameters if name in dense_of]
        first = by_matrix.get(names[0])
        if first is None:
            by_matrix |= dict.fromkeys(names, found)
            sources.append(found)
        elif not _equal(source, first, found):
            raise ModelError(
                f"{source.folder}: config.json ties {found.parameters[0]} to {first.parameters[0]}, but the checkpoint "
                "has other weights for each; use --dense-format native"
            )
    lost = [dense.parameters[0] for dense in matrices if dense.name not in by_matrix]
    if lost:
        raise ModelError(f"{source.folder}: weight {lost[0]} is missing; the checkpoint does not fit its config.json")
    return sources, sorted(keys)


def _equal(source: CheckpointSource, one: tw.ParameterSource, other: tw.ParameterSource) -> bool:
    pairs = zip(source.read_parameters(one, _BLOCK), source.read_parameters(other, _BLOCK), strict=True)
    return all(torch.equal(mine, theirs) for (_, _, mine), (_, _, theirs) in pairs)


def _misfit(source: CheckpointSource, parameter: str) -> ModelError:
    return ModelError(
        f"{source.folder}: weight {parameter} has another shape than config.json says; the checkpoint does not fit its "
        "config.json"
    )


def _layouts(matrices: Sequence[DenseMatrix]) -> str:
    """What must be the same for a file to be of use, as the header says it."""
    return json.dumps(
        {
            dense.name: [dense.layout.rows, dense.layout.columns, dense.layout.bits, dense.layout.group]
            for dense in matrices
        }
    )


def _parts(matrix: QuantizedMatrix) -> tuple[tuple[str, torch.Tensor], ...]:
    return ("codes", matrix.codes), ("params", matrix.params)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
