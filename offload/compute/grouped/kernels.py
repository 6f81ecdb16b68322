"""Triton kernels over all experts of an event that are ready, wherever their slots are.

A launch has one *tile* for each part of the work, a row of an int64 table (``launches.Tile``): the address of the
expert's record, where its rows stand in each buffer, and their number. Nothing else differs between experts: one launch
serves all of them. Tiles do not know of each other, so what an expert gives does not depend on which others share the
launch.

The layouts of the weights are those of docs/formats.md. Sums are in float32. Weights of 4 bits are decoded to float32
for a single row, and for tensor cores to the dtype of the input, as the plain torch path does.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE_COLUMNS: tl.constexpr = tl.constexpr(5)
_ALIGNED: tl.constexpr = tl.constexpr(16)


@triton.jit
def _at(record, place, element: tl.constexpr):
    """What stands ``place`` bytes into a record; the compiler must be told that it may load 16 bytes at a time."""
    return tl.multiple_of((record + place).to(tl.pointer_type(element)), _ALIGNED)


@triton.jit
def multiply_row(
    tiles,
    inputs,
    output,
    rows,
    columns,
    codes_at,
    params_at,
    bias_at,
    stride_row,
    stride_column,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One row of ``inputs`` [n, columns] times a matrix [rows, columns], for each tile: a row of ``output`` [n, rows].

    Programs: (blocks of the matrix's rows, tiles). BITS 16 stands for weights in the dtype of the input, with any
    strides. SOURCE and TARGET are the columns of the table that hold the first rows.
    """
    tile = tiles + tl.program_id(1) * TILE_COLUMNS
    record = tl.load(tile)
    source = inputs + tl.load(tile + SOURCE) * columns
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    if BITS == 4:
        GROUPS: tl.constexpr = BLOCK_COLUMNS // GROUP
        BYTES: tl.constexpr = GROUP // 2
        groups = tl.cdiv(columns, GROUP)
        codes = _at(record, codes_at, tl.uint8)
        params = _at(record, params_at, tl.bfloat16)
        for first in range(0, groups, GROUPS):
            group = first + tl.arange(0, GROUPS)
            byte = group[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
            there = inside[:, None] & (group < groups)[None, :]
            even = tl.load(source + 2 * byte, mask=2 * byte < columns, other=0).to(tl.float32)
            odd = tl.load(source + 2 * byte + 1, mask=2 * byte + 1 < columns, other=0).to(tl.float32)
            packed = tl.load(
                codes + row[:, None, None] * (groups * BYTES) + byte[None, :, :], mask=there[:, :, None], other=0
            )
            low = (packed & 15).to(tl.float32) - 8
            high = (packed >> 4).to(tl.float32) - 8
            products = tl.sum(low * even[None, :, :] + high * odd[None, :, :], 2)
            param = params + (row[:, None] * groups + group[None, :]) * 2
            scale = tl.load(param, mask=there, other=0).to(tl.float32)
            shift = tl.load(param + 1, mask=there, other=0).to(tl.float32)
            total += tl.sum(products * scale + shift * tl.sum(even + odd, 1)[None, :], 1)
    else:
        if BITS == 8:
            weights = _at(record, codes_at, tl.int8)
        else:
            weights = _at(record, codes_at, inputs.dtype.element_ty)
        for first in range(0, columns, BLOCK_COLUMNS):
            column = first + tl.arange(0, BLOCK_COLUMNS)
            states = tl.load(source + column, mask=column < columns, other=0).to(tl.float32)
            weight = tl.load(
                weights + row[:, None] * stride_row + column[None, :] * stride_column,
                mask=inside[:, None] & (column < columns)[None, :],
                other=0,
            )
            total += tl.sum(weight.to(tl.float32) * states[None, :], 1)
        if BITS == 8:
            total *= tl.load(_at(record, params_at, tl.float32) + row, mask=inside, other=0)
    if HAS_BIAS:
        bias = _at(record, bias_at, inputs.dtype.element_ty)
        total += tl.load(bias + row, mask=inside, other=0).to(tl.float32)
    target = output + tl.load(tile + TARGET) * rows
    tl.store(target + row, total.to(output.dtype.element_ty), mask=inside)


@triton.jit
def multiply_rows(
    tiles,
    inputs,
    output,
    token_of,
    rows,
    columns,
    codes_at,
    params_at,
    bias_at,
    stride_row,
    stride_column,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATHER: tl.constexpr,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """As :func:`multiply_row` for up to BLOCK_TOKENS rows a tile, on tensor cores.

    GATHER: row i of the input is ``inputs[token_of[i]]``. FACTORS is the dtype that is multiplied: that of the input,
    but float32 in Triton's interpreter, which cannot multiply bfloat16. With 4 bits, BLOCK_COLUMNS is GROUP.
    """
    tile = tiles + tl.program_id(1) * TILE_COLUMNS
    record = tl.load(tile)
    token = tl.arange(0, BLOCK_TOKENS)
    real = token < tl.load(tile + TILE_COLUMNS - 1)
    place = tl.load(tile + SOURCE) + token
    if GATHER:
        place = tl.load(token_of + place, mask=real, other=0).to(tl.int64)
    source = inputs + place * columns
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    dtype = inputs.dtype.element_ty
    total = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], tl.float32)
    if BITS == 4:
        BYTES: tl.constexpr = GROUP // 2
        groups = tl.cdiv(columns, GROUP)
        codes = _at(record, codes_at, tl.uint8)
        params = _at(record, params_at, tl.bfloat16)
    elif BITS == 8:
        weights = _at(record, codes_at, tl.int8)
    else:
        weights = _at(record, codes_at, dtype)
    for first in range(0, columns, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)
        states = tl.load(source[:, None] + column[None, :], mask=real[:, None] & (column < columns)[None, :], other=0)
        if BITS == 4:
            byte = first // 2 + tl.arange(0, BYTES)
            packed = tl.load(codes + row[:, None] * (groups * BYTES) + byte[None, :], mask=inside[:, None], other=0)
            param = params + (row * groups + first // GROUP) * 2
            scale = tl.load(param, mask=inside, other=0).to(tl.float32)[:, None]
            shift = tl.load(param + 1, mask=inside, other=0).to(tl.float32)[:, None]
            low = ((packed & 15).to(tl.float32) - 8) * scale + shift
            high = ((packed >> 4).to(tl.float32) - 8) * scale + shift
            weight = tl.interleave(low.to(dtype), high.to(dtype))
        else:
            weight = tl.load(
                weights + row[:, None] * stride_row + column[None, :] * stride_column,
                mask=inside[:, None] & (column < columns)[None, :],
                other=0,
            )
            if BITS == 8:
                weight = weight.to(tl.float32).to(dtype)  # exact: a code has 8 bits
        total = tl.dot(states.to(FACTORS), tl.trans(weight).to(FACTORS), total, input_precision="ieee")
    if BITS == 8:
        scale = tl.load(_at(record, params_at, tl.float32) + row, mask=inside, other=0)
        total *= scale[None, :]
    if HAS_BIAS:
        bias = _at(record, bias_at, dtype)
        total += tl.load(bias + row, mask=inside, other=0).to(tl.float32)[None, :]
    target = output + (tl.load(tile + TARGET) + token) * rows
    tl.store(target[:, None] + row[None, :], total.to(output.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton.jit
def combine(
    products,
    routed,
    row_of,
    output,
    columns,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Of each token, the sum of its rows of ``products`` times their weights, in the order of ``row_of`` [tokens, k].

    ``routed`` holds the weight of each of the token's k choices; ``row_of`` says for the i-th summand which choice it
    is, and which row; row -1 is none. Rounds to WEIGHTED after each product and to SUM before and after each sum: bit
    for bit what torch's ``index_add_`` gives on the CPU. On a card, that one sums in any order.
    """
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < columns
    total = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for index in range(TOP_K):
        entry = row_of + (token * TOP_K + index) * 2
        choice = tl.load(entry)
        row = tl.load(entry + 1).to(tl.int64)
        weight = tl.load(routed + token * TOP_K + choice).to(tl.float32)
        there = column < tl.where(row >= 0, columns, 0)
        product = tl.load(products + row * columns + column, mask=there, other=0).to(tl.float32)
        weighted = (product * weight).to(WEIGHTED).to(tl.float32).to(SUM).to(tl.float32)
        total = (total + tl.where(there, weighted, 0)).to(SUM).to(tl.float32)
    tl.store(output + token * columns + column, total.to(output.dtype.element_ty), mask=inside)


def dtype(name):
    """Triton's name of a torch dtype."""
    return getattr(tl, str(name).removeprefix("torch."))
