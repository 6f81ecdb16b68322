"""The compiled kernels for published formats (published.c): decoding with torch's bits, products with few tokens."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch

from offload.checkpoint.formats.compressed import CompressedLayout
from offload.checkpoint.formats.fp8 import Fp8Layout
from offload.checkpoint.formats.gguf import GgufLayout
from offload.checkpoint.formats.mxfp4 import GROUP, Mxfp4Layout
from offload.checkpoint.formats.packed import PackedLayout, PackedMatrix
from offload.compute.kernels import Kernels, load_kernels

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_SMALL = 2**16  # weights that are not worth a second thread
_FP8, _MXFP4, _INT4, _GGUF = 0, 1, 2, {"Q4_0": 3, "Q8_0": 4, "Q4_K": 5, "Q5_K": 6, "Q6_K": 7}
"""Places in the kernels' list of formats."""

FEW_TOKENS = 8
"""The most tokens that are multiplied without decoding the whole matrix first; with more, the library is faster."""


class _Packed(ctypes.Structure):
    """A matrix as its parts hold it, a row an output."""

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("format", "rows", "columns", "block_rows", "block_columns")),
    ]


class _Parts(NamedTuple):
    """What a kernel takes for a matrix; ``blocks`` are (rows, columns) that share a scale, or 0."""

    format: int
    codes: torch.Tensor
    scales: torch.Tensor | None
    shape: tuple[int, int]
    blocks: tuple[int, int] = (0, 0)

    def described(self) -> _Packed:
        scales = None if self.scales is None else self.scales.data_ptr()
        return _Packed(self.codes.data_ptr(), scales, self.format, *self.shape, *self.blocks)


class PublishedKernels:
    """Several threads share a matrix, as many as torch has. What these do not know is left to the caller."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        library, pointer, number = kernels.library, ctypes.c_void_p, ctypes.c_int
        self._decode, self._linear = library.rl_packed_decode, library.rl_packed_linear
        self._decode.argtypes = [pointer, pointer, number, number, number]
        self._decode.restype = None
        self._linear.argtypes = [pointer, pointer, number, pointer, number, number, number]

    def decode(self, matrix: PackedMatrix, out: torch.Tensor) -> bool:
        """Write the weights into ``out``, contiguous [*matrix.layout.shape]; False: this is not done here."""
        dtype, parts = _DTYPES.get(out.dtype), _parts(matrix)
        if parts is None or dtype is None or not out.is_contiguous():
            return False
        packed = parts.described()
        transposed = int(matrix.layout.transposed)
        self._decode(ctypes.byref(packed), out.data_ptr(), dtype, transposed, self._threads(out.numel()))
        return True

    def takes(self, matrix: PackedMatrix, dtype: torch.dtype) -> bool:
        """Whether :meth:`linear` multiplies inputs of ``dtype`` with this matrix."""
        return dtype in _DTYPES and _parts(matrix) is not None

    def linear(self, matrix: PackedMatrix, inputs: torch.Tensor, output: torch.Tensor) -> None:
        """Products of ``inputs`` [tokens, inputs] with all outputs of a matrix that is taken, into ``output``.

        ``output`` [tokens, outputs] may be a part of the columns of a larger tensor, of the dtype of ``inputs``. The
        weights are rounded to that dtype, as they are when they are decoded, and summed in float32. A product depends
        on nothing but its row and its token. Raises MemoryError if there is none for a row of weights.
        """
        parts = _parts(matrix)
        assert parts is not None and inputs.is_contiguous() and output.stride(1) == 1
        assert inputs.shape[1] == parts.shape[1] and output.shape == (len(inputs), parts.shape[0])
        packed, dtype = parts.described(), _DTYPES[inputs.dtype]
        threads = self._threads(parts.shape[0] * parts.shape[1])
        addresses = inputs.data_ptr(), len(inputs), output.data_ptr(), output.stride(0)
        if self._linear(ctypes.byref(packed), *addresses, dtype, threads):
            raise MemoryError("no memory for a row of weights")

    def _threads(self, weights: int) -> int:
        return (self._kernels.threads or torch.get_num_threads()) if weights > _SMALL else 1


def _parts(matrix: PackedMatrix) -> _Parts | None:
    """What the kernels take for ``matrix``; None: none of them knows it."""
    prepare = _PREPARE.get(type(matrix.layout))
    return None if prepare is None or matrix.parts[0].device.type != "cpu" else prepare(matrix)


def _fp8(matrix: PackedMatrix) -> _Parts | None:
    layout = matrix.layout
    assert isinstance(layout, Fp8Layout)
    codes, scale = matrix.parts
    if codes.dtype != torch.float8_e4m3fn or scale.dtype not in (torch.float32, torch.bfloat16):
        return None
    return _Parts(_FP8, codes, scale.float(), layout.shape, (layout.block_rows, layout.block_columns))


def _mxfp4(matrix: PackedMatrix) -> _Parts:
    codes, scale = matrix.parts
    rows, groups = scale.shape
    return _Parts(_MXFP4, codes, scale, (rows, groups * GROUP))


def _int4(matrix: PackedMatrix) -> _Parts | None:
    layout = matrix.layout
    assert isinstance(layout, CompressedLayout)
    plain = layout.bits == 4 and layout.scale == "bfloat16" and not layout.zero and not layout.order
    if not plain or layout.group % GROUP or layout.shape[1] % layout.group:
        return None
    codes, scale = matrix.parts
    return _Parts(_INT4, codes, scale, layout.shape, (1, layout.group))


def _gguf(matrix: PackedMatrix) -> _Parts | None:
    layout = matrix.layout
    assert isinstance(layout, GgufLayout)
    number = _GGUF.get(layout.type)
    return None if number is None else _Parts(number, matrix.parts[0], None, layout.shape)


_PREPARE: dict[type[PackedLayout], Callable[[PackedMatrix], _Parts | None]] = {
    Fp8Layout: _fp8,
    Mxfp4Layout: _mxfp4,
    CompressedLayout: _int4,
    GgufLayout: _gguf,
}


def load_published(on_failure: Callable[[str], None] | None = None) -> PublishedKernels | None:
    """The kernels of this machine, compiled at the first call of all; None, with ``on_failure`` told why, without."""
    kernels = load_kernels(on_failure)
    return None if kernels is None else PublishedKernels(kernels)
