"""Experts whose matrices have 8 or 4 bits a weight."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch

from offload.checkpoint.formats.base import (
    TENSOR_ALIGNMENT,
    TensorSpecs,
    WeightFormat,
    Weights,
    native_view,
    place,
    write_native,
)
from offload.checkpoint.formats.packed import PackedMatrix
from offload.checkpoint.manifest import RecordLayout, TensorLayout, align
from offload.compute.kernels import load_kernels
from offload.compute.matrix import Error, MatrixLayout, QuantizedMatrix, encode

_DTYPES = {"int8": (8, 0), "int4-g32": (4, 32), "int4-g64": (4, 64), "int4-g128": (4, 128)}
"""(bits, group) of the names that stand for a quantised matrix in a record layout."""


class QuantizedFormat(WeightFormat):
    """Matrices (parameters with two dimensions) are quantised and stand as [outputs, inputs]; the rest is native.

    ``dtype`` names the layout of all matrices but those of ``others``. In a record, a matrix is its codes and, at the
    next aligned place, its params.
    """

    def __init__(self, name: str, dtype: str, others: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._dtype = dtype
        self._others = dict(others or {})

    def layout(self, tensors: TensorSpecs, transposed: Collection[str] = ()) -> RecordLayout:
        sizes = {}
        for name, (shape, dtype) in tensors.items():
            assert isinstance(dtype, torch.dtype), "packed weights are decoded first"
            if len(shape) != 2:
                sizes[name] = (shape, str(dtype).removeprefix("torch."), math.prod(shape) * dtype.itemsize)
                continue
            rows, columns = reversed(shape) if name in transposed else shape
            bits, group = _DTYPES[self._others.get(name, self._dtype)]
            matrix = MatrixLayout.make(rows, columns, bits, group)
            kept = f"int4-g{matrix.group}" if bits == 4 else "int8"
            sizes[name] = ((rows, columns), kept, sum(_part_bytes(matrix)))
        return place(sizes)

    def encode(
        self,
        layout: RecordLayout,
        tensors: Mapping[str, torch.Tensor | PackedMatrix],
        record: torch.Tensor,
        transposed: Collection[str] = (),
    ) -> Error:
        error = Error()
        for tensor in layout.tensors:
            value = tensors[tensor.name]
            assert isinstance(value, torch.Tensor)
            if tensor.dtype not in _DTYPES:
                write_native(tensor, record, value)
                continue
            value = value.t() if tensor.name in transposed else value
            if value.shape != tensor.shape:
                raise ValueError(f"{tensor.name} has shape {tuple(value.shape)} instead of {tuple(tensor.shape)}")
            error = error.plus(encode(value, _view(tensor, record), load_kernels()))
        return error

    def views(self, layout: RecordLayout, record: torch.Tensor) -> Weights:
        return {
            tensor.name: _view(tensor, record) if tensor.dtype in _DTYPES else native_view(tensor, record)
            for tensor in layout.tensors
        }


def matrix_layout(tensor: TensorLayout) -> MatrixLayout:
    """The layout of a quantised matrix of a record. Raises KeyError if the tensor is native."""
    (rows, columns), (bits, group) = tensor.shape, _DTYPES[tensor.dtype]
    return MatrixLayout(rows, columns, bits, group)


def part_offsets(tensor: TensorLayout) -> tuple[int, int]:
    """Where codes and params of a quantised matrix start, in bytes from the start of the record."""
    return tensor.offset, tensor.offset + _part_bytes(matrix_layout(tensor))[0]


def _part_bytes(matrix: MatrixLayout) -> tuple[int, int]:
    codes = math.prod(matrix.codes_shape) * matrix.codes_dtype.itemsize
    return align(codes, TENSOR_ALIGNMENT), math.prod(matrix.params_shape) * matrix.params_dtype.itemsize


def _view(tensor: TensorLayout, record: torch.Tensor) -> QuantizedMatrix:
    matrix = matrix_layout(tensor)
    codes_at, params_at = part_offsets(tensor)
    codes = record[codes_at : codes_at + math.prod(matrix.codes_shape) * matrix.codes_dtype.itemsize]
    params = record[params_at : tensor.offset + tensor.bytes]
    return QuantizedMatrix(
        matrix,
        codes.view(matrix.codes_dtype).view(matrix.codes_shape),
        params.view(matrix.params_dtype).view(matrix.params_shape),
    )
