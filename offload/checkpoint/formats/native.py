"""The checkpoint's own dtype, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from offload.checkpoint.formats.base import TensorSpecs, WeightFormat
from offload.checkpoint.manifest import RECORD_ALIGNMENT, RecordLayout, TensorLayout, align

TENSOR_ALIGNMENT = 64  # a cache line and an AVX-512 register: kernels take the same path in every slot


class NativeFormat(WeightFormat):
    name = "native"

    def layout(self, tensors: TensorSpecs) -> RecordLayout:
        offset = 0
        placed = []
        for name, (shape, dtype) in sorted(tensors.items()):
            offset = align(offset, TENSOR_ALIGNMENT)
            size = math.prod(shape) * dtype.itemsize
            placed.append(TensorLayout(name, tuple(shape), str(dtype).removeprefix("torch."), offset, size))
            offset += size
        return RecordLayout(align(offset, RECORD_ALIGNMENT), tuple(placed))

    def encode(self, layout: RecordLayout, tensors: Mapping[str, torch.Tensor], record: torch.Tensor) -> None:
        for name, view in self.views(layout, record).items():
            if tensors[name].shape != view.shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(view.shape)}")
            view.copy_(tensors[name])

    def views(self, layout: RecordLayout, record: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            tensor.name: record[tensor.offset : tensor.offset + tensor.bytes]
            .view(getattr(torch, tensor.dtype))
            .view(tensor.shape)
            for tensor in layout.tensors
        }
