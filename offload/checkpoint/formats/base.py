"""The contract of a weight format: how one expert becomes one record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import ClassVar

import torch

from offload.checkpoint.formats.packed import PackedLayout, PackedMatrix, PackedParameter
from offload.checkpoint.manifest import RECORD_ALIGNMENT, RecordLayout, TensorLayout, align
from offload.compute.matrix import Error, QuantizedMatrix

TensorSpecs = Mapping[str, tuple[tuple[int, ...], torch.dtype | PackedLayout]]
"""Shape of one expert's part of each parameter, and its dtype in the model, or how the checkpoint holds it."""

Weights = dict[str, "torch.Tensor | QuantizedMatrix | PackedParameter"]
"""An expert's parameters as views into its record."""

TENSOR_ALIGNMENT = 64  # a cache line and an AVX-512 register: kernels take the same path in every slot


class WeightFormat(ABC):
    """Knows the layout of a record, how an expert is written into one, and how it is looked at there.

    Who multiplies with what :meth:`views` gives is chosen by the format and the device (``offload/compute``).
    """

    name: str

    lossless: ClassVar[bool] = False
    """Whether the weights come back bit for bit."""

    published: ClassVar[bool] = False
    """Whether packed weights are taken as the checkpoint holds them, else decoded."""

    @abstractmethod
    def layout(self, tensors: TensorSpecs, transposed: Collection[str] = ()) -> RecordLayout:
        """Where each tensor stands in a record. A pure function of shapes and dtypes.

        ``transposed``: the matrices that the experts module holds as [inputs, outputs].
        """

    @abstractmethod
    def encode(
        self,
        layout: RecordLayout,
        tensors: Mapping[str, torch.Tensor | PackedMatrix],
        record: torch.Tensor,
        transposed: Collection[str] = (),
    ) -> Error:
        """Write one expert into ``record``, uint8[layout.record_bytes]; padding is left as it is.

        Returns what the quantised weights lost, which is not finite if a weight is not.
        """

    @abstractmethod
    def views(self, layout: RecordLayout, record: torch.Tensor) -> Weights:
        """The expert's tensors as views into ``record``, uint8[>= layout.record_bytes]; nothing is copied."""


def place(sizes: Mapping[str, tuple[tuple[int, ...], str, int]]) -> RecordLayout:
    """The record layout of tensors with these shapes, dtypes and bytes: in the order of their names, aligned."""
    offset = 0
    placed = []
    for name, (shape, dtype, size) in sorted(sizes.items()):
        offset = align(offset, TENSOR_ALIGNMENT)
        placed.append(TensorLayout(name, tuple(shape), dtype, offset, size))
        offset += size
    return RecordLayout(align(offset, RECORD_ALIGNMENT), tuple(placed))


def native_view(tensor: TensorLayout, record: torch.Tensor) -> torch.Tensor:
    """A tensor that stands in a record as torch has it."""
    data = record[tensor.offset : tensor.offset + tensor.bytes]
    return data.view(getattr(torch, tensor.dtype)).view(tensor.shape)


def write_native(tensor: TensorLayout, record: torch.Tensor, value: torch.Tensor) -> None:
    """Raises ValueError if ``value`` has another shape."""
    if value.shape != tensor.shape:
        raise ValueError(f"{tensor.name} has shape {tuple(value.shape)} instead of {tuple(tensor.shape)}")
    native_view(tensor, record).copy_(value)
