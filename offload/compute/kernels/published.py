"""Calls into the compiled decoders of published formats (published.c); the same bits as without them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from offload.checkpoint.formats.compressed import CompressedLayout
from offload.checkpoint.formats.fp8 import Fp8Layout
from offload.checkpoint.formats.mxfp4 import GROUP, Mxfp4Layout
from offload.checkpoint.formats.packed import PackedLayout, PackedMatrix
from offload.compute.kernels import load_kernels

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_ROWS = 16  # a thread's share is a multiple of this
_SMALL = 2**16  # weights that are not worth a second thread
Call = Callable[[int, int], None]
"""Decodes the rows from the first number to the second."""


class Decoders:
    """Several threads share a matrix, as many as torch has. ``library`` is that of the kernels."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, long, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
        ends: list[Any] = [pointer, number, long, long]
        self.fp8, self.mxfp4, self.int4 = library.rl_fp8, library.rl_mxfp4, library.rl_int4
        self.fp8.argtypes = [pointer, pointer, long, long, long, *ends]
        self.mxfp4.argtypes = [pointer, pointer, long, long, number, *ends]
        self.int4.argtypes = [pointer, pointer, long, long, *ends]
        for function in (self.fp8, self.mxfp4, self.int4):
            function.restype = None
        self._pool: ThreadPoolExecutor | None = None
        self._workers = 0

    def decode(self, matrix: PackedMatrix, out: torch.Tensor) -> bool:
        """Write the weights into ``out``, contiguous [*matrix.layout.shape]; False: this is not done here."""
        prepare, dtype = _PREPARE.get(type(matrix.layout)), _DTYPES.get(out.dtype)
        if prepare is None or dtype is None or not out.is_contiguous():
            return False
        found = prepare(self, matrix, out, dtype)
        if found is None:
            return False
        rows, call = found
        threads = torch.get_num_threads() if out.numel() > _SMALL else 1
        step = -(-rows // (threads * _ROWS)) * _ROWS
        shares = [(first, min(first + step, rows)) for first in range(0, rows, step)]
        others = [self._submit(len(shares) - 1, call, *share) for share in shares[1:]]
        call(*shares[0])
        for other in others:
            other.result()
        return True

    def _submit(self, workers: int, call: Call, first: int, last: int) -> Future[None]:
        if self._pool is None or self._workers < workers:
            self._pool, self._workers = ThreadPoolExecutor(workers, "decode"), workers
        return self._pool.submit(call, first, last)


Prepare = Callable[[Decoders, PackedMatrix, torch.Tensor, int], "tuple[int, Call] | None"]


def _fp8(decoders: Decoders, matrix: PackedMatrix, out: torch.Tensor, dtype: int) -> tuple[int, Call] | None:
    layout = matrix.layout
    assert isinstance(layout, Fp8Layout)
    codes, scale = matrix.parts
    if codes.dtype != torch.float8_e4m3fn or scale.dtype not in (torch.float32, torch.bfloat16):
        return None
    rows, columns = layout.shape
    blocks = layout.block_rows, layout.block_columns
    scale = scale.float()

    def call(first: int, last: int) -> None:  # holds the scales, which may be a copy
        decoders.fp8(codes.data_ptr(), scale.data_ptr(), columns, *blocks, out.data_ptr(), dtype, first, last)

    return rows, call


def _mxfp4(decoders: Decoders, matrix: PackedMatrix, out: torch.Tensor, dtype: int) -> tuple[int, Call] | None:
    codes, scale = matrix.parts
    rows, groups = scale.shape
    turned = int(matrix.layout.transposed)
    ends = codes.data_ptr(), scale.data_ptr(), rows, groups * GROUP, turned, out.data_ptr(), dtype
    return rows, partial(decoders.mxfp4, *ends)


def _int4(decoders: Decoders, matrix: PackedMatrix, out: torch.Tensor, dtype: int) -> tuple[int, Call] | None:
    layout = matrix.layout
    assert isinstance(layout, CompressedLayout)
    plain = layout.bits == 4 and layout.scale == "bfloat16" and not layout.zero and not layout.order
    if not plain or layout.group % GROUP or layout.shape[1] % layout.group:
        return None
    codes, scale = matrix.parts
    rows, columns = layout.shape
    return rows, partial(
        decoders.int4, codes.data_ptr(), scale.data_ptr(), columns, layout.group, out.data_ptr(), dtype
    )


_PREPARE: dict[type[PackedLayout], Prepare] = {Fp8Layout: _fp8, Mxfp4Layout: _mxfp4, CompressedLayout: _int4}


def load_decoders(on_failure: Callable[[str], None] | None = None) -> Decoders | None:
    """The decoders of this machine, compiled at the first call of all; None, with ``on_failure`` told why, without."""
    kernels = load_kernels(on_failure)
    return None if kernels is None else Decoders(kernels.library)
