"""The checkpoint's own dtype, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from offload.checkpoint.formats.base import TensorSpecs, WeightFormat, Weights, native_view, place, write_native
from offload.checkpoint.manifest import RecordLayout
from offload.compute.matrix import Error


class NativeFormat(WeightFormat):
    name = "native"
    lossless = True

    def layout(self, tensors: TensorSpecs, transposed: bool = False) -> RecordLayout:
        return place(
            {
                name: (shape, str(dtype).removeprefix("torch."), math.prod(shape) * dtype.itemsize)
                for name, (shape, dtype) in tensors.items()
            }
        )

    def encode(
        self,
        layout: RecordLayout,
        tensors: Mapping[str, torch.Tensor],
        record: torch.Tensor,
        transposed: bool = False,
    ) -> Error:
        for tensor in layout.tensors:
            write_native(tensor, record, tensors[tensor.name])
        return Error()

    def views(self, layout: RecordLayout, record: torch.Tensor) -> Weights:
        return {tensor.name: native_view(tensor, record) for tensor in layout.tensors}
