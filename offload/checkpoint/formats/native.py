"""The checkpoint's own numbers, bit for bit: in its own dtype, or packed as it is published."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import ClassVar

import torch

from offload.checkpoint.formats.base import (
    TensorSpecs,
    WeightFormat,
    Weights,
    native_view,
    place,
    write_native,
)
from offload.checkpoint.formats.methods import parse_layout
from offload.checkpoint.formats.packed import PackedLayout, PackedMatrix, PackedParameter
from offload.checkpoint.manifest import RecordLayout, TensorLayout
from offload.compute.matrix import Error


class NativeFormat(WeightFormat):
    """A packed matrix is one tensor of the record: its parts, each at the next multiple of 64 bytes.

    A parameter of several matrices is as many tensors, ``gate_up_proj.0`` and so on; they stand one below the other.
    """

    name = "native"
    lossless = True
    published: ClassVar[bool] = True

    def layout(self, tensors: TensorSpecs, transposed: Collection[str] = ()) -> RecordLayout:
        sizes = {}
        for name, (shape, held) in tensors.items():
            if isinstance(held, PackedLayout):
                sizes[name] = (shape, held.spec, held.bytes)
            else:
                sizes[name] = (shape, str(held).removeprefix("torch."), math.prod(shape) * held.itemsize)
        return place(sizes)

    def encode(
        self,
        layout: RecordLayout,
        tensors: Mapping[str, torch.Tensor | PackedMatrix],
        record: torch.Tensor,
        transposed: Collection[str] = (),
    ) -> Error:
        """The error is not finite if a scale of a packed matrix is not."""
        finite = True
        for tensor in layout.tensors:
            value = tensors[tensor.name]
            if isinstance(value, torch.Tensor):
                write_native(tensor, record, value)
                continue
            if value.layout.spec != tensor.dtype:
                raise ValueError(f"{tensor.name} is held as {value.layout.spec} instead of {tensor.dtype}")
            for part, into in zip(value.parts, _matrix(value.layout, tensor, record).parts, strict=True):
                into.copy_(part)
            finite = finite and value.layout.finite(value.parts)
        return Error() if finite else Error(math.nan)

    def views(self, layout: RecordLayout, record: torch.Tensor) -> Weights:
        found: Weights = {}
        pieces: dict[str, list[PackedMatrix | torch.Tensor]] = {}
        for tensor in layout.tensors:
            name, _, number = tensor.name.partition(".")
            packed = parse_layout(tensor.dtype, tensor.shape)
            if packed is None and not number:
                found[name] = native_view(tensor, record)
                continue
            view = native_view(tensor, record) if packed is None else _matrix(packed, tensor, record)
            pieces.setdefault(name, []).append(view)
        return found | {name: PackedParameter(tuple(parts)) for name, parts in pieces.items()}


def _matrix(packed: PackedLayout, tensor: TensorLayout, record: torch.Tensor) -> PackedMatrix:
    """A packed matrix as views into its record."""
    parts = []
    for part, offset in zip(packed.parts, packed.offsets, strict=True):
        data = record[tensor.offset + offset : tensor.offset + offset + part.bytes]
        parts.append(data.view(part.dtype).view(part.shape))
    return PackedMatrix(packed, tuple(parts))
