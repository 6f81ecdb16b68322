"""The compiled kernels for published formats: decoding with torch's bits, products with few tokens.

``published.c`` makes the weights of each format, ``packed.c`` decodes and multiplies.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch

from offload.checkpoint.formats.awq import AwqLayout
from offload.checkpoint.formats.bitsandbytes import BitsAndBytesLayout
from offload.checkpoint.formats.compressed import CompressedLayout
from offload.checkpoint.formats.fp8 import Fp8Layout
from offload.checkpoint.formats.gguf import GgufLayout
from offload.checkpoint.formats.gptq import GptqLayout
from offload.checkpoint.formats.mxfp4 import GROUP, Mxfp4Layout
from offload.checkpoint.formats.nvfp4 import Nvfp4Layout
from offload.checkpoint.formats.packed import PackedLayout, PackedMatrix
from offload.compute.kernels import Kernels, load_kernels

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 3}
_SMALL = 2**16  # weights that are not worth a second thread
_FP8, _MXFP4, _INT4, _GGUF = 0, 1, 2, {"Q4_0": 3, "Q8_0": 4, "Q4_K": 5, "Q5_K": 6, "Q6_K": 7}
_NVFP4, _GPTQ, _AWQ, _NF4, _GROUPED = 8, 9, 10, 11, 12
"""Places in the kernels' list of formats."""

_RUN = 32
"""Inputs that the kernels take at a time: of a row, and of a group where there are groups."""
_AWQ_ORDER, _BY_ROWS = 256, 512
_SCALES = ("float16", "bfloat16")
_DONE, _NO_MEMORY = 0, 1

FEW_TOKENS = 8
"""The most tokens that are multiplied without decoding the whole matrix first; with more, the library is faster."""


class _Packed(ctypes.Structure):
    """A matrix as its parts hold it, a row an output (``weights.h``)."""

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("more", ctypes.c_void_p * 4),
        *((name, ctypes.c_int32) for name in ("format", "rows", "columns", "block_rows", "block_columns", "variant")),
    ]


class _Parts(NamedTuple):
    """What a kernel takes for a matrix of ``shape`` [outputs, inputs].

    ``transposed``: the model has it as [inputs, outputs]. What the other fields are, published.c says of each format.
    """

    format: int
    shape: tuple[int, int]
    codes: torch.Tensor
    scales: torch.Tensor | None = None
    blocks: tuple[int, int] = (0, 0)
    more: tuple[torch.Tensor, ...] = ()
    variant: int = 0
    transposed: bool = False

    def described(self) -> _Packed:
        scales = None if self.scales is None else self.scales.data_ptr()
        more = (ctypes.c_void_p * 4)(*(part.data_ptr() for part in self.more))
        return _Packed(self.codes.data_ptr(), scales, more, self.format, *self.shape, *self.blocks, self.variant)


class PublishedKernels:
    """Several threads share a matrix, as many as torch has. What these do not know is left to the caller."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        library, pointer, number = kernels.library, ctypes.c_void_p, ctypes.c_int
        self._decode, self._linear = library.rl_packed_decode, library.rl_packed_linear
        self._decode.argtypes = [pointer, pointer, number, number, number]
        self._linear.argtypes = [pointer, pointer, number, pointer, number, number, number]

    def decode(self, matrix: PackedMatrix, out: torch.Tensor) -> bool:
        """Write the weights into ``out``, contiguous [*matrix.layout.shape]; False: this is not done here.

        Raises MemoryError if there is none for a part of the weights.
        """
        dtype, parts = _DTYPES.get(out.dtype), _parts(matrix)
        if parts is None or dtype is None or not out.is_contiguous():
            return False
        packed = parts.described()
        threads = self._threads(out.numel())
        return _done(self._decode(ctypes.byref(packed), out.data_ptr(), dtype, int(parts.transposed), threads))

    def takes(self, matrix: PackedMatrix, dtype: torch.dtype, inputs_first: bool) -> bool:
        """Whether :meth:`linear` may multiply inputs of ``dtype`` with this matrix.

        ``inputs_first``: the model has it as [inputs, outputs], else as [outputs, inputs].
        """
        parts = _parts(matrix) if dtype in _DTYPES else None
        return parts is not None and parts.transposed == inputs_first

    def linear(self, matrix: PackedMatrix, inputs: torch.Tensor, output: torch.Tensor) -> bool:
        """Products of ``inputs`` [tokens, inputs] with all outputs of a matrix that is taken, into ``output``.

        ``output`` [tokens, outputs] may be a part of the columns of a larger tensor, of the dtype of ``inputs``. The
        weights are rounded to that dtype, as they are when they are decoded, and summed in float32. A product depends
        on nothing but its row and its token. False: its groups of inputs are such that this is not done here. Raises
        MemoryError if there is none for a part of the weights.
        """
        parts = _parts(matrix)
        assert parts is not None and inputs.is_contiguous() and output.stride(1) == 1
        assert inputs.shape[1] == parts.shape[1] and output.shape == (len(inputs), parts.shape[0])
        packed, dtype = parts.described(), _DTYPES[inputs.dtype]
        threads = self._threads(parts.shape[0] * parts.shape[1])
        addresses = inputs.data_ptr(), len(inputs), output.data_ptr(), output.stride(0)
        return _done(self._linear(ctypes.byref(packed), *addresses, dtype, threads))

    def _threads(self, weights: int) -> int:
        return (self._kernels.threads or torch.get_num_threads()) if weights > _SMALL else 1


def _done(found: int) -> bool:
    if found == _NO_MEMORY:
        raise MemoryError("no memory for a part of an expert's weights")
    return found == _DONE


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
    return _Parts(_FP8, layout.shape, codes, scale.float(), (layout.block_rows, layout.block_columns))


def _mxfp4(matrix: PackedMatrix) -> _Parts:
    codes, scale = matrix.parts
    rows, groups = scale.shape
    return _Parts(_MXFP4, (rows, groups * GROUP), codes, scale, transposed=matrix.layout.transposed)


def _nvfp4(matrix: PackedMatrix) -> _Parts | None:
    layout = matrix.layout
    assert isinstance(layout, Nvfp4Layout)
    codes, scale, whole = matrix.parts
    if layout.shape[1] % _RUN:
        return None
    return _Parts(_NVFP4, layout.shape, codes, scale, more=(whole,), variant=layout.divides)


def _int4(matrix: PackedMatrix) -> _Parts | None:
    layout = matrix.layout
    assert isinstance(layout, CompressedLayout)
    if layout.bits != 4 or layout.order or layout.group % _RUN or layout.shape[1] % layout.group:
        return None
    codes, scale, *zero = matrix.parts
    if layout.scale == "bfloat16" and not zero:
        return _Parts(_INT4, layout.shape, codes, scale, (1, layout.group))
    if layout.scale not in _SCALES:
        return None
    blocks = int(layout.scale == "bfloat16"), layout.group
    return _Parts(_GROUPED, layout.shape, codes, scale, blocks, tuple(zero), _BY_ROWS)


def _gptq(matrix: PackedMatrix) -> _Parts | None:
    layout = matrix.layout
    assert isinstance(layout, GptqLayout)
    if layout.bits != 4 or layout.shape[1] % layout.groups:
        return None
    return _by_inputs(_GPTQ, matrix, layout.scale, layout.shape[1] // layout.groups, layout.less)


def _awq(matrix: PackedMatrix) -> _Parts | None:
    layout = matrix.layout
    assert isinstance(layout, AwqLayout)
    return _by_inputs(_AWQ, matrix, layout.scale, layout.group, _AWQ_ORDER)


def _by_inputs(number: int, matrix: PackedMatrix, scale: str, group: int, variant: int) -> _Parts | None:
    shape = matrix.layout.shape
    if scale not in _SCALES or group % _RUN or shape[0] % 8:
        return None
    codes, scales, *more = matrix.parts
    return _Parts(number, shape, codes, scales, (int(scale == "bfloat16"), group), tuple(more), variant)


def _nf4(matrix: PackedMatrix) -> _Parts | None:
    layout = matrix.layout
    assert isinstance(layout, BitsAndBytesLayout)
    if layout.blocksize % _RUN or layout.shape[1] % _RUN:
        return None
    codes, absmax, *more = matrix.parts
    return _Parts(_NF4, layout.shape, codes, absmax, (1, layout.blocksize), tuple(more), layout.nested)


def _gguf(matrix: PackedMatrix) -> _Parts | None:
    layout = matrix.layout
    assert isinstance(layout, GgufLayout)
    number = _GGUF.get(layout.type)
    return None if number is None else _Parts(number, layout.shape, matrix.parts[0])


_PREPARE: dict[type[PackedLayout], Callable[[PackedMatrix], _Parts | None]] = {
    Fp8Layout: _fp8,
    Mxfp4Layout: _mxfp4,
    Nvfp4Layout: _nvfp4,
    CompressedLayout: _int4,
    GptqLayout: _gptq,
    AwqLayout: _awq,
    BitsAndBytesLayout: _nf4,
    GgufLayout: _gguf,
}


def load_published(on_failure: Callable[[str], None] | None = None) -> PublishedKernels | None:
    """The kernels of this machine, compiled at the first call of all; None, with ``on_failure`` told why, without."""
    kernels = load_kernels(on_failure)
    return None if kernels is None else PublishedKernels(kernels)
