"""Calls into the compiled decoders of published formats (published.c); the same bits as without them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from offload.checkpoint.formats.compressed import CompressedLayout
from offload.checkpoint.formats.fp8 import Fp8Layout
from offload.checkpoint.formats.mxfp4 import GROUP, Mxfp4Layout
from offload.checkpoint.formats.packed import PackedLayout, PackedMatrix
from offload.compute.kernels.build import BuildError, build

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_Call = Callable[["Decoders", PackedMatrix, torch.Tensor, int], bool]


class Decoders:
    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, long, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
        ends: list[Any] = [pointer, number, number]
        self.fp8, self.mxfp4, self.int4 = library.rl_fp8, library.rl_mxfp4, library.rl_int4
        self.fp8.argtypes = [pointer, pointer, long, long, long, long, *ends]
        self.mxfp4.argtypes = [pointer, pointer, long, long, number, *ends]
        self.int4.argtypes = [pointer, pointer, long, long, long, *ends]
        for function in (self.fp8, self.mxfp4, self.int4):
            function.restype = None

    def decode(self, matrix: PackedMatrix, out: torch.Tensor) -> bool:
        """Write the weights into ``out``, contiguous [*matrix.layout.shape]; False: this is not done here."""
        call = _CALLS.get(type(matrix.layout))
        dtype = _DTYPES.get(out.dtype)
        return call is not None and dtype is not None and out.is_contiguous() and call(self, matrix, out, dtype)


def _fp8(decoders: Decoders, matrix: PackedMatrix, out: torch.Tensor, dtype: int) -> bool:
    layout = matrix.layout
    assert isinstance(layout, Fp8Layout)
    codes, scale = matrix.parts
    if codes.dtype != torch.float8_e4m3fn or scale.dtype not in (torch.float32, torch.bfloat16):
        return False
    scale = scale.float()
    blocks = layout.block_rows, layout.block_columns
    decoders.fp8(codes.data_ptr(), scale.data_ptr(), *layout.shape, *blocks, out.data_ptr(), dtype, _threads())
    return True


def _mxfp4(decoders: Decoders, matrix: PackedMatrix, out: torch.Tensor, dtype: int) -> bool:
    codes, scale = matrix.parts
    rows, groups = scale.shape
    turned = matrix.layout.transposed
    columns = groups * GROUP
    decoders.mxfp4(codes.data_ptr(), scale.data_ptr(), rows, columns, turned, out.data_ptr(), dtype, _threads())
    return True


def _int4(decoders: Decoders, matrix: PackedMatrix, out: torch.Tensor, dtype: int) -> bool:
    layout = matrix.layout
    assert isinstance(layout, CompressedLayout)
    plain = layout.bits == 4 and layout.scale == "bfloat16" and not layout.zero and not layout.order
    if not plain or layout.group % GROUP or layout.shape[1] % layout.group:
        return False
    codes, scale = matrix.parts
    decoders.int4(codes.data_ptr(), scale.data_ptr(), *layout.shape, layout.group, out.data_ptr(), dtype, _threads())
    return True


def _threads() -> int:
    return torch.get_num_threads()


_CALLS: dict[type[PackedLayout], _Call] = {Fp8Layout: _fp8, Mxfp4Layout: _mxfp4, CompressedLayout: _int4}
_loaded: dict[str, Decoders | str] = {}


def load_decoders(on_failure: Callable[[str], None] | None = None) -> Decoders | None:
    """The decoders of this machine, compiled at the first call of all; None, with ``on_failure`` told why, without."""
    if "decoders" not in _loaded:
        try:
            _loaded["decoders"] = Decoders(ctypes.CDLL(str(build(Path(__file__).with_name("published.c")))))
        except (BuildError, OSError) as error:
            _loaded["decoders"] = str(error)
    found = _loaded["decoders"]
    if isinstance(found, Decoders):
        return found
    if on_failure is not None:
        on_failure(found)
    return None
