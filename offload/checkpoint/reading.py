"""Reads checkpoint tensors into memory that is used again and again, without a copy where none is needed.

Packing touches every weight once. New memory for each tensor and the copies of stacking and joining them took three
times as long as quantising does: the system clears a page at a time.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from offload.checkpoint.formats.packed import Entry
from offload.checkpoint.manifest import align
from offload.errors import ModelError

_ALIGNMENT = 16  # of a piece of staging memory: any dtype may stand there
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
"""The names that safetensors has for dtypes; tensors of others are left to its own reader."""


class Staging:
    """Memory for the tensors of one expert, handed out piece by piece and used again after :meth:`reset`.

    It grows to what the largest expert asked for. For one thread at a time.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def take(self, size: int) -> torch.Tensor:
        """uint8[size], behind the piece before it; good until the next :meth:`reset`."""
        start = align(self._used, _ALIGNMENT)
        self._used = start + size
        if self._used > len(self._memory):
            return torch.empty(size, dtype=torch.uint8)  # the next time there is room
        return self._memory[start : self._used]

    def reset(self) -> None:
        """All pieces may be overwritten from now on."""
        if self._used > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # first let go of the old
            self._memory = torch.empty(self._used, dtype=torch.uint8)
        self._used = 0


class KnownPlace(NamedTuple):
    """Where a tensor stands in a file whose header is read elsewhere (GGUF)."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Place(NamedTuple):
    """Where a tensor stands: ``offset`` and ``row_bytes`` in bytes; a row is a part along the first dimension."""

    fd: int
    offset: int
    row_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFiles:
    """The tensors of safetensors files, by name, and of other files those in ``known``.

    ``files`` names the file of each. For several threads, but for :meth:`close`.
    """

    def __init__(self, files: Mapping[str, Path], known: Mapping[str, KnownPlace] | None = None) -> None:
        self._files = files
        self._known = known or {}
        self._open: dict[Path, tuple[int, int, dict[str, Any]]] = {}  # file -> fd, start of the data, header
        self._opening = threading.Lock()

    def read(self, key: str, rows: slice, staging: Staging) -> torch.Tensor | None:
        """``rows`` of a tensor, in ``staging``; None if it has a dtype or shape that is not read here.

        Raises ModelError if the file is damaged or cannot be read.
        """
        file = self._files[key]
        try:
            place = self._place(key)
            if place is None:
                return None
            first, last, _ = rows.indices(place.shape[0])
            start, size = place.offset + first * place.row_bytes, (last - first) * place.row_bytes
            memory = staging.take(size)
            _read_all(place.fd, memoryview(memory.numpy()), start)
            if hasattr(os, "posix_fadvise"):  # with memory full of them, the system takes longer to free than to read
                os.posix_fadvise(place.fd, start, size, os.POSIX_FADV_DONTNEED)
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ModelError(f"{file}: tensor {key} cannot be read ({reason}); download the file again") from error
        return memory.view(place.dtype).view(last - first, *place.shape[1:])

    def entries(self) -> dict[str, Entry]:
        """Dtype and shape of every tensor. Raises ModelError if a header is damaged."""
        found = {}
        for key, file in self._files.items():
            try:
                entry = self._header(file)[2][key]
                found[key] = Entry(_DTYPES.get(entry["dtype"]), tuple(entry["shape"]))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{file}: the file is damaged or incomplete ({error}); download it again") from error
        return found

    def read_whole(self, key: str) -> torch.Tensor:
        """A whole tensor in memory of its own. Raises ModelError if it cannot be read."""
        return self.read_rows(key, slice(None))

    def read_rows(self, key: str, rows: slice) -> torch.Tensor:
        """As :meth:`read`, in memory of its own. Raises ModelError also for another dtype or shape."""
        found = self.read(key, rows, Staging())
        if found is None:
            raise ModelError(f"{self._files[key]}: tensor {key} has a dtype or shape that is not supported")
        return found

    def announce(self, key: str, rows: slice) -> None:
        """Let the system start reading ``rows`` of a tensor: :meth:`read` comes soon."""
        if not hasattr(os, "posix_fadvise"):
            return
        try:
            place = self._place(key)
            if place is not None:
                first, last, _ = rows.indices(place.shape[0])
                start, size = place.offset + first * place.row_bytes, (last - first) * place.row_bytes
                os.posix_fadvise(place.fd, start, size, os.POSIX_FADV_WILLNEED)
        except (OSError, ValueError, KeyError, TypeError):
            return  # read says it

    def close(self) -> None:
        """Close the files; they open again when needed."""
        for fd, _, _ in self._open.values():
            os.close(fd)
        self._open.clear()

    def _header(self, file: Path) -> tuple[int, int, dict[str, Any]]:
        """File descriptor, start of the data, and the header, which is empty for files that have another one."""
        with self._opening:
            if file not in self._open:
                fd = os.open(file, os.O_RDONLY)
                try:
                    if file.suffix == ".safetensors":
                        length = int.from_bytes(os.pread(fd, 8, 0), "little")
                        self._open[file] = (fd, 8 + length, json.loads(os.pread(fd, length, 8)))
                    else:
                        self._open[file] = (fd, 0, {})
                except BaseException:
                    os.close(fd)
                    raise
            return self._open[file]

    def _place(self, key: str) -> _Place | None:
        fd, data, header = self._header(self._files[key])
        if known := self._known.get(key):
            row_bytes = math.prod(known.shape[1:]) * known.dtype.itemsize
            return _Place(fd, known.offset, row_bytes, known.dtype, known.shape)
        entry = header[key]
        dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        if dtype is None or not shape:
            return None
        start, _ = entry["data_offsets"]
        return _Place(fd, data + start, math.prod(shape[1:]) * dtype.itemsize, dtype, shape)


class KeepInPlace(TorchFunctionMode):
    """While it is active, stacking one tensor and joining tensors that stand side by side give views, not copies.

    That is most of what transformers' conversion does to a single expert; the rest of it works as ever.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.stack, torch.cat) and len(args) == 1 and kwargs.keys() <= {"dim"}:
            tensors, dim = list(args[0]), kwargs.get("dim", 0)
            joined = _stacked(tensors, dim) if func is torch.stack else _joined(tensors, dim)
            if joined is not None:
                return joined
        return func(*args, **kwargs)


def _stacked(tensors: list[torch.Tensor], dim: int) -> torch.Tensor | None:
    return tensors[0].unsqueeze(dim) if len(tensors) == 1 else None


def _joined(tensors: list[torch.Tensor], dim: int) -> torch.Tensor | None:
    """The tensors one behind the other along ``dim`` as a view of the memory that they share, or None."""
    first = tensors[0]
    dim %= first.dim()
    end = first.data_ptr()
    for tensor in tensors:
        if (
            tensor.dtype != first.dtype
            or tensor.shape[:dim] != first.shape[:dim]
            or tensor.shape[dim + 1 :] != first.shape[dim + 1 :]
            or not tensor.is_contiguous()
            or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or tensor.data_ptr() != end
        ):
            return None
        end += tensor.nbytes
    if math.prod(first.shape[:dim]) != 1:
        return None
    shape = (*first.shape[:dim], sum(tensor.shape[dim] for tensor in tensors), *first.shape[dim + 1 :])
    return first.as_strided(shape, torch.empty(shape, device="meta").stride())


def _read_all(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill ``buffer``. Raises EOFError if the file ends before."""
    while buffer:
        count = os.preadv(fd, [buffer], offset)
        if not count:
            raise EOFError("the file ends there")
        buffer, offset = buffer[count:], offset + count
