"""Matrices as checkpoints publish them quantised: what they are held in, and what their weights are.

A record of the format ``native`` keeps the published bytes of such a matrix. Each way of holding one is a
:class:`PackedLayout` in a file of its own; ``methods.py`` has the list.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch

from offload.checkpoint.manifest import align

PART_ALIGNMENT = 64
_BLOCK = 2**20  # weights that are decoded at a time: it bounds what decoding needs beside its result


class Part(NamedTuple):
    """One of the tensors that hold a matrix."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PackedLayout(ABC):
    """How one matrix ``shape`` (as the model has it) is held. All other fields are numbers or words.

    ``transposed``: its parts hold it the other way round, by columns. ``step``: rows (of the parts) that can be
    decoded alone come in multiples of this.
    """

    kind: ClassVar[str]
    step: ClassVar[int] = 1

    shape: tuple[int, int]

    @property
    def transposed(self) -> bool:
        return False

    @property
    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """What holds the matrix, in the order in which it stands in a record."""

    @abstractmethod
    def block(self, parts: tuple[torch.Tensor, ...], start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of what the parts hold, exact or in float32."""

    def finite(self, parts: tuple[torch.Tensor, ...]) -> bool:
        """Whether all scales are numbers. A checkpoint where they are not is damaged."""
        return all(bool(part.isfinite().all()) for part in parts if part.dtype in _SCALES)

    @property
    def spec(self) -> str:
        """The layout but for its shape as one word, for the manifest: ``fp8:block_rows=128,block_columns=128``."""
        said = ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self) if field.name != "shape")
        return f"{self.kind}:{said}" if said else self.kind

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each part starts, in bytes from the start of the first."""
        found, end = [], 0
        for part in self.parts:
            end = align(end, PART_ALIGNMENT)
            found.append(end)
            end += part.bytes
        return tuple(found)

    @property
    def bytes(self) -> int:
        """Of all parts and what aligns them."""
        return self.offsets[-1] + self.parts[-1].bytes

    def decode(self, parts: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        """Write the weights into ``out`` [*shape], rounded once to its dtype."""
        into = out.t() if self.transposed else out
        rows, columns = into.shape
        with contextlib.nullcontext() if out.device.type == "cpu" else out.device:  # where block makes its numbers
            for start in range(0, rows, self._rows_at_a_time(columns)):
                stop = min(start + self._rows_at_a_time(columns), rows)
                into[start:stop] = self.block(parts, start, stop)

    def decode_rows(self, parts: tuple[torch.Tensor, ...], rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the matrix as the model has it, in memory of their own."""
        first, last, _ = rows.indices(self.shape[0])
        if self.transposed or first % self.step or last % self.step or (first, last) == (0, self.shape[0]):
            whole = torch.empty(self.shape, dtype=dtype)
            self.decode(parts, whole)
            return whole[first:last]
        out = torch.empty(last - first, self.shape[1], dtype=dtype)
        for start in range(first, last, self._rows_at_a_time(self.shape[1])):
            stop = min(start + self._rows_at_a_time(self.shape[1]), last)
            out[start - first : stop - first] = self.block(parts, start, stop)
        return out

    def _rows_at_a_time(self, columns: int) -> int:
        return max(self.step, _BLOCK // max(columns, 1) // self.step * self.step)


class PackedMatrix(NamedTuple):
    """One published matrix: its parts, views into a record or tensors of their own."""

    layout: PackedLayout
    parts: tuple[torch.Tensor, ...]


class PackedTensor(NamedTuple):
    """A tensor that a checkpoint does not hold itself: ``keys`` are the checkpoint tensors of its parts.

    ``experts`` counts the matrices that are stacked in it along a first dimension; None: it is one matrix. Parts after
    those of the keys are the single numbers ``constants``.
    """

    layout: PackedLayout
    keys: tuple[str, ...]
    experts: int | None = None
    constants: tuple[float, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape if self.experts is None else (self.experts, *self.layout.shape)


class PackedParameter(NamedTuple):
    """One expert's part of a parameter: its matrices one below the other; some may not be packed."""

    pieces: tuple[PackedMatrix | torch.Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        shapes = [piece.shape if isinstance(piece, torch.Tensor) else piece.layout.shape for piece in self.pieces]
        return sum(shape[0] for shape in shapes), shapes[0][1]

    @property
    def device(self) -> torch.device:
        first = self.pieces[0]
        return first.device if isinstance(first, torch.Tensor) else first.parts[0].device

    def decode(self, out: torch.Tensor, decode: Callable[[PackedMatrix, torch.Tensor], None]) -> torch.Tensor:
        """Write the weights into ``out`` [*shape] and return it; ``decode`` does it for one matrix."""
        row = 0
        for piece in self.pieces:
            rows = len(piece) if isinstance(piece, torch.Tensor) else piece.layout.shape[0]
            if isinstance(piece, torch.Tensor):
                out[row : row + rows] = piece
            else:
                decode(piece, out[row : row + rows])
            row += rows
        return out


_SCALES = (torch.float32, torch.bfloat16, torch.float16)


def parse_fields(layout: type[PackedLayout], said: str) -> dict[str, Any]:
    """The fields that :attr:`PackedLayout.spec` said behind the colon. Raises ValueError for others."""
    kinds = {field.name: field.type for field in fields(layout) if field.name != "shape"}
    pairs = [pair.partition("=")[::2] for pair in said.split(",") if pair]
    if {name for name, _ in pairs} != kinds.keys():
        raise ValueError(f"'{said}' does not describe {layout.kind}")
    return {name: int(value) if kinds[name] == "int" else value for name, value in pairs}


class Entry(NamedTuple):
    """Dtype and shape of a checkpoint tensor, as its file's header says; dtype None: none that torch has."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]


Entries = Mapping[str, Entry]
