"""A matrix with quantised weights: its layout, and encoding, decoding and multiplying it with torch alone.

The layout is one for all devices (docs/formats.md). What stands here is the reference for the compiled kernels and the
fallback where there are none.

4 bits: groups of 32, 64 or 128 columns with a scale and a shift each. The two are searched for the least squared error,
as in llama.cpp's ``make_qkx2_quants`` (ggml/src/ggml-quants.c): trial scales around the plain one, each made the best
for the codes that it gives by least squares. Here the best of all is refined twice more in the same way. 8 bits: one
scale a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from offload.compute.kernels import Kernels
from offload.compute.kernels.binding import Shape

GROUPS = (32, 64, 128)
_TRIALS = 16  # these two and the trial scales are those of kernels/encode.c
_REFINEMENTS = 2
_BLOCK_ROWS = 1024  # rows that are encoded or decoded at a time without the kernels, to bound the memory


@dataclass(frozen=True, slots=True)
class MatrixLayout:
    """Shape of a quantised matrix, and of the two tensors that hold it. ``group`` is 0 with 8 bits."""

    rows: int
    columns: int
    bits: int
    group: int

    @classmethod
    def make(cls, rows: int, columns: int, bits: int, group: int = 64) -> MatrixLayout:
        """``group`` is made smaller for a matrix with fewer columns. Raises ValueError for other bits or groups."""
        if bits == 8:
            return cls(rows, columns, 8, 0)
        if bits != 4 or group not in GROUPS:
            raise ValueError(f"{bits} bits in groups of {group} are no known layout")
        return cls(rows, columns, 4, min(group, next((g for g in GROUPS if g >= columns), group)))

    @property
    def padded(self) -> int:
        """Columns that have a code: with 4 bits up to the end of the last group."""
        return self.columns if self.bits == 8 else math.ceil(self.columns / self.group) * self.group

    @property
    def codes_shape(self) -> tuple[int, int]:
        return (self.rows, self.columns if self.bits == 8 else self.padded // 2)

    @property
    def codes_dtype(self) -> torch.dtype:
        return torch.int8 if self.bits == 8 else torch.uint8

    @property
    def params_shape(self) -> tuple[int, ...]:
        return (self.rows,) if self.bits == 8 else (self.rows, self.padded // self.group, 2)

    @property
    def params_dtype(self) -> torch.dtype:
        return torch.float32 if self.bits == 8 else torch.bfloat16

    @property
    def bytes(self) -> int:
        return (
            math.prod(self.codes_shape) * self.codes_dtype.itemsize
            + math.prod(self.params_shape) * self.params_dtype.itemsize
        )

    @property
    def shape(self) -> Shape:
        return Shape(self.rows, self.columns, self.padded, self.group, self.bits)


class QuantizedMatrix(NamedTuple):
    """``codes`` and ``params`` as :class:`MatrixLayout` says; views into a record, or tensors of their own."""

    layout: MatrixLayout
    codes: torch.Tensor
    params: torch.Tensor


class Error(NamedTuple):
    """Sums of squares over all weights: what quantising lost, and the weights themselves.

    One of them is not finite if a weight is not, or is too large for the scales.
    """

    lost: float = 0.0
    all: float = 0.0

    def plus(self, other: Error) -> Error:
        return Error(self.lost + other.lost, self.all + other.all)

    @property
    def relative(self) -> float:
        """Root mean square error relative to that of the weights."""
        return math.sqrt(self.lost / self.all) if self.all else 0.0

    @property
    def finite(self) -> bool:
        return math.isfinite(self.lost) and math.isfinite(self.all)


def empty_matrix(layout: MatrixLayout) -> QuantizedMatrix:
    return QuantizedMatrix(
        layout,
        torch.zeros(layout.codes_shape, dtype=layout.codes_dtype),
        torch.zeros(layout.params_shape, dtype=layout.params_dtype),
    )


def encode(weights: torch.Tensor, into: QuantizedMatrix, kernels: Kernels | None) -> Error:
    """Quantise ``weights`` [rows, columns] (any float dtype) into ``into``, which is overwritten."""
    layout = into.layout
    assert weights.shape == (layout.rows, layout.columns)
    weights = weights.contiguous()
    if kernels is not None:
        if weights.dtype not in (torch.float32, torch.bfloat16):
            weights = weights.float()
        return Error(*kernels.encode(layout.shape, weights, into.codes, into.params))
    error = Error()
    block = _encode8 if layout.bits == 8 else _encode4
    for start in range(0, layout.rows, _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        exact = weights[part].float()
        codes, params, decoded = block(exact, layout)
        into.codes[part], into.params[part] = codes, params
        error = error.plus(Error(_sum_of_squares(decoded - exact), _sum_of_squares(exact)))
    return error


def decode(
    matrix: QuantizedMatrix, dtype: torch.dtype, kernels: Kernels | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The weights [rows, columns] in ``dtype``, rounded from float32 once; written into ``out`` if it is given."""
    layout = matrix.layout
    if out is None:
        out = torch.empty(layout.rows, layout.columns, dtype=dtype, device=matrix.codes.device)
    if kernels is not None and out.dtype in (torch.float32, torch.bfloat16):
        kernels.decode(layout.shape, matrix.codes.data_ptr(), matrix.params.data_ptr(), out)
        return out
    for start in range(0, layout.rows, _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        if layout.bits == 8:
            out[part] = matrix.codes[part] * matrix.params[part, None]
        else:
            out[part] = _decode4(matrix.codes[part], matrix.params[part], layout)
    return out


def _encode8(weights: torch.Tensor, layout: MatrixLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = weights.abs().amax(1) / 127
    codes = (weights / scale.where(scale > 0, 1)[:, None]).round_()
    return codes.to(torch.int8), scale, codes * scale[:, None]


def _encode4(weights: torch.Tensor, layout: MatrixLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = torch.nn.functional.pad(weights, (0, layout.padded - layout.columns))
    groups = groups.view(len(weights), -1, layout.group)
    real = torch.arange(layout.padded).view(-1, layout.group) < layout.columns  # [groups, group]
    low = groups.masked_fill(~real, math.inf).amin(-1, keepdim=True)
    span = groups.masked_fill(~real, -math.inf).amax(-1, keepdim=True) - low
    scale, base = _search(((groups - low) / span.where(span > 0, 1)).where(real, 0), real)
    # what is stored is rounded, and the codes are chosen for the rounded values
    params = torch.cat([scale * span, (base + 8 * scale) * span + low], -1).to(torch.bfloat16)
    scale, shift = params.float().split(1, -1)
    level = ((groups - shift) / scale.where(scale > 0, math.inf)).clamp(-8, 7).round()
    codes = (level + 8).to(torch.uint8) * real
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    packed = packed.view(len(weights), -1)
    return packed, params, _decode4(packed, params, layout)


def _search(weights: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and base of each group of ``weights`` [rows, groups, group] in 0 to 1: a weight is code * scale + base."""
    count = real.sum(-1, keepdim=True)
    total, squares = weights.sum(-1, keepdim=True), weights.square().sum(-1, keepdim=True)
    scale, base = torch.full_like(total, 1 / 15), torch.zeros_like(total)
    best = torch.full_like(total, math.inf)
    for step in range(_TRIALS + _REFINEMENTS):
        if step < _TRIALS:
            codes = (weights * (13.4 + 0.15 * step)).round().clamp(max=15)
        else:
            codes = ((weights - base) / scale).round().clamp(0, 15) * real
        sums, both, mixed = (x.sum(-1, keepdim=True) for x in (codes, codes * codes, codes * weights))
        determinant = count * both - sums * sums
        trial = (count * mixed - sums * total) / determinant
        offset = (both * total - sums * mixed) / determinant
        lost = squares - trial * mixed - offset * total
        better = (trial > 0) & (lost < best)  # never true of the NaNs that a constant group gives
        scale, base, best = trial.where(better, scale), offset.where(better, base), lost.where(better, best)
    return scale, base


def _sum_of_squares(values: torch.Tensor) -> float:
    """In float64: the square of a large float32 is none."""
    return values.double().square().sum().item()


def _decode4(codes: torch.Tensor, params: torch.Tensor, layout: MatrixLayout) -> torch.Tensor:
    levels = torch.stack([codes & 15, codes >> 4], -1).view(len(codes), -1, layout.group).float() - 8
    scale, shift = params.float().split(1, -1)
    return (levels * scale + shift).view(len(codes), -1)[:, : layout.columns]
