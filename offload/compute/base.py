"""The contract of what computes the experts of one event."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cache.keys import ExpertKey
from offload.checkpoint.formats import Weights

WeightsOf = Callable[[ExpertKey], Weights]
"""The weights of an expert whose record is ready in a slot, as views into the slot."""


class EventCompute(ABC):
    """One event under way. The result does not depend on the order and the groups in which experts are computed."""

    experts: Sequence[int]
    """The distinct experts of the event, ascending."""

    calls: int
    """Calls into kernels or the library that multiplied with experts' weights, so far."""

    @abstractmethod
    def compute(self, ready: Sequence[ExpertKey]) -> None:
        """Compute these experts over their tokens; their records are in slots, and stay there until this returns."""

    @abstractmethod
    def products(self, expert: int) -> torch.Tensor:
        """An expert's products of its tokens [rows, H], for an event of the same routing elsewhere to :meth:`accept`.

        It must have been computed by this event, which was begun with routing weights of 1.
        """

    @abstractmethod
    def accept(self, expert: int, products: torch.Tensor) -> None:
        """Take an expert's ``products`` [rows, H], on this event's device, instead of computing them."""

    @abstractmethod
    def result(self) -> torch.Tensor:
        """The sum of all experts' weighted products, [T, H]; every expert must have been computed."""


class RowEvent(EventCompute):
    """An event that keeps the products of all pairs of a token and an expert in one tensor, expert by expert."""

    _rows: dict[int, tuple[int, int]]  # of each expert: its first row, and how many
    _products: torch.Tensor  # [rows, H]

    def products(self, expert: int) -> torch.Tensor:
        first, count = self._rows[expert]
        return self._products[first : first + count]

    def accept(self, expert: int, products: torch.Tensor) -> None:
        first, count = self._rows[expert]
        self._products[first : first + count] = products


class ExpertCompute(ABC):
    """How experts of one weight format are computed on one device."""

    @abstractmethod
    def begin(
        self,
        module: Any,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        weights_of: WeightsOf,
    ) -> EventCompute:
        """Start an event. ``hidden`` is [T, H], ``top_k_index`` and ``top_k_weights`` are [T, k].

        Ids at or beyond ``module.num_experts`` mean "no expert".
        """
