"""What a launch of the grouped kernels consists of: where matrices stand in their records, and how the work is cut."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from offload.checkpoint.formats import Weights
from offload.compute.matrix import QuantizedMatrix

ROW_TILES = (16, 64)
"""Rows that a tile of many takes: the smaller one where experts have few."""

_FUSED = {"enable_fp_fusion": True}  # said, because Triton's default changes with its version


@dataclass(frozen=True, slots=True)
class Placed:
    """A matrix [rows, columns] in a record of any expert of its layer; places are bytes from the record's anchor.

    ``bits`` is 16 for weights in the model's own dtype, whose strides are in elements. ``bias_at`` is None without a
    bias.
    """

    rows: int
    columns: int
    bits: int
    group: int = 0
    codes_at: int = 0
    params_at: int = 0
    bias_at: int | None = None
    strides: tuple[int, int] = (0, 1)


class Tile(NamedTuple):
    """A part of a launch: ``rows`` rows for the expert whose record has its anchor at this address.

    ``source`` is the first of them in the event's input, ``local`` between the two products of a call, and ``target``
    in the event's products.
    """

    record: int
    source: int
    local: int
    target: int
    rows: int


_SOURCE, _LOCAL, _TARGET = (Tile._fields.index(name) for name in ("source", "local", "target"))


def place(weights: Weights, names: Sequence[str], transposed: Collection[str] = ()) -> tuple[list[Placed], str]:
    """Where the matrices ``names`` and their biases stand, and the name of the anchor: what stands first.

    ``transposed``: the native matrices that are held as [inputs, outputs].
    """
    starts = {name: first_address(weight) for name, weight in weights.items()}
    anchor = min(starts, key=starts.__getitem__)
    placed = []
    for name in names:
        matrix, bias = weights[name], starts.get(f"{name}_bias")
        bias_at = None if bias is None else bias - starts[anchor]
        if isinstance(matrix, QuantizedMatrix):
            layout = matrix.layout
            codes_at, params_at = (part.data_ptr() - starts[anchor] for part in (matrix.codes, matrix.params))
            strides = (layout.columns, 1)
            placed.append(
                Placed(layout.rows, layout.columns, layout.bits, layout.group, codes_at, params_at, bias_at, strides)
            )
        else:
            assert isinstance(matrix, torch.Tensor)
            matrix = matrix.t() if name in transposed else matrix
            rows, columns = matrix.shape
            strides = (matrix.stride(0), matrix.stride(1))
            placed.append(Placed(rows, columns, 16, 0, starts[name] - starts[anchor], 0, bias_at, strides))
    return placed, anchor


def first_address(weight: Any) -> int:
    """Where a tensor or a quantised matrix of a record begins."""
    address: int = (weight.codes if isinstance(weight, QuantizedMatrix) else weight).data_ptr()
    return address


def cut(record: int, first: int, local: int, rows: int, size: int | None) -> list[Tile]:
    """The tiles of an expert with ``rows`` rows, the first of which is ``first`` in the event: at most ``size`` each.

    None: the event has one token, and each tile has one row.
    """
    if size is None:
        return [Tile(record, 0, local + at, first + at, 1) for at in range(rows)]
    return [Tile(record, first + at, local + at, first + at, min(size, rows - at)) for at in range(0, rows, size)]


def row_tile(rows: int, experts: int) -> int:
    """Rows of a tile in an event with these rows and experts; follows from the routing, not from what is resident."""
    small, large = ROW_TILES
    return small if rows <= small * experts else large


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel's name, its grid, its arguments by name, and options of the compiler."""

    kernel: str
    grid: tuple[int, int]
    arguments: Mapping[str, Any]
    options: Mapping[str, int]


def product(
    placed: Placed,
    tiles: torch.Tensor,
    inputs: torch.Tensor,
    output: torch.Tensor,
    *,
    inner: bool,
    size: int | None,
    token_of: torch.Tensor | None = None,
) -> Launch:
    """Multiply with one matrix of every tile's expert.

    ``tiles`` is int64[n, 5], of :class:`Tile`, with at most ``size`` rows each; None: one. The first product of a call
    goes from ``source``, which then counts in ``token_of`` (int32) if that is given, to ``local``; the second, which is
    ``inner``, from there to ``target``.
    """
    source, target = (_LOCAL, _TARGET) if inner else (_SOURCE, _LOCAL)
    arguments: dict[str, Any] = {
        "tiles": tiles,
        "inputs": inputs,
        "output": output,
        "rows": placed.rows,
        "columns": placed.columns,
        "codes_at": placed.codes_at,
        "params_at": placed.params_at,
        "bias_at": placed.bias_at or 0,
        "stride_row": placed.strides[0],
        "stride_column": placed.strides[1],
        "BITS": placed.bits,
        "GROUP": placed.group,
        "HAS_BIAS": placed.bias_at is not None,
        "SOURCE": source,
        "TARGET": target,
    }
    if size is None:
        block_rows = 16
        arguments |= {"BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": 512 if placed.bits == 4 else 256}
        name, options = "multiply_row", {"num_warps": 4, **_FUSED}
    else:
        block_rows = 64
        arguments |= {
            "token_of": tiles if token_of is None else token_of,
            "GATHER": token_of is not None,
            "FACTORS": inputs.dtype,
            "BLOCK_TOKENS": size,
            "BLOCK_ROWS": block_rows,
            "BLOCK_COLUMNS": placed.group if placed.bits == 4 else 64,
        }
        stages = 2 if inputs.dtype is torch.float32 else 3  # more would not fit the shared memory of consumer cards
        name, options = "multiply_rows", {"num_warps": 4, "num_stages": stages, **_FUSED}
    return Launch(name, (-(-placed.rows // block_rows), len(tiles)), arguments, options)


def combination(
    products: torch.Tensor,
    routed: torch.Tensor,
    row_of: torch.Tensor,
    output: torch.Tensor,
    weighted: torch.dtype,
    sums: torch.dtype,
) -> Launch:
    """Sum ``products`` [n, H] to ``output`` [T, H]; ``routed`` is [T, k], ``row_of`` int32[T, k, 2]."""
    tokens, columns = output.shape
    arguments = {
        "products": products,
        "routed": routed,
        "row_of": row_of,
        "output": output,
        "columns": columns,
        "TOP_K": routed.shape[1],
        "WEIGHTED": weighted,
        "SUM": sums,
        "BLOCK_COLUMNS": 512,
    }
    return Launch("combine", (-(-columns // 512), tokens), arguments, {"num_warps": 4, **_FUSED})
