"""The contract of a weight format: how one expert becomes one record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from offload.checkpoint.manifest import RecordLayout

TensorSpecs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape of one expert's part of each parameter, and its dtype in the model."""


class WeightFormat(ABC):
    name: ClassVar[str]

    @abstractmethod
    def layout(self, tensors: TensorSpecs) -> RecordLayout:
        """Where each tensor stands in a record. A pure function of shapes and dtypes."""

    @abstractmethod
    def encode(self, layout: RecordLayout, tensors: Mapping[str, torch.Tensor], record: torch.Tensor) -> None:
        """Write one expert into ``record``, uint8[layout.record_bytes]; padding is left as it is."""

    @abstractmethod
    def views(self, layout: RecordLayout, record: torch.Tensor) -> dict[str, torch.Tensor]:
        """The expert's tensors as views into ``record``, uint8[>= layout.record_bytes]; nothing is copied."""
