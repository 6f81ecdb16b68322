"""The contract of a predictor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cache.events import Events

State = dict[str, NDArray[Any]]
"""What a predictor has learned, as arrays that ``np.savez`` takes."""


class PredictorError(ValueError):
    """A predictor that does not exist or cannot work here, or a state that is not its own; the message is one line."""


@dataclass(frozen=True, slots=True)
class PredictorContext:
    """``layers`` are the MoE layers in their order, ``experts`` the most that one has; ``future`` is for simulation."""

    layers: tuple[int, ...]
    experts: int
    future: Events | None = None


class Predictor(ABC):
    """Foretells the experts of the event that comes next, from those that came before.

    It is told of every event (:meth:`record_event`) in order, learns from it, and can then be asked for the layers
    after it (:meth:`predict`), which after the last layer are the first ones of the next token. Asking changes nothing.
    """

    name: ClassVar[str]
    simulation_only: ClassVar[bool] = False

    def __init__(self, context: PredictorContext) -> None:
        self.layers = context.layers
        self.experts = context.experts
        self._after = dict(zip(self.layers, self.layers[1:] + self.layers[:1], strict=True))

    def layer_after(self, layer: int, steps: int = 1) -> int:
        """The layer whose event comes ``steps`` events after that of ``layer``."""
        for _ in range(steps):
            layer = self._after[layer]
        return layer

    @abstractmethod
    def record_event(self, layer: int, experts: Sequence[int], *, decode: bool) -> None:
        """One event, its experts by rank; ``decode`` tells that it is one token's."""

    @abstractmethod
    def predict(self, layer: int, limit: int, steps: int = 1) -> list[int]:
        """At most ``limit`` experts, likeliest first, of the event that comes ``steps`` after that of ``layer``.

        ``layer`` is that of the last event. Nothing where there is nothing to go by.
        """

    def state(self) -> State:
        """What was learned; empty for those that learn nothing that lasts."""
        return {}

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:  # noqa: B027 - some have none
        """Go on from :meth:`state` of a predictor of the same model. Raises PredictorError if it does not fit."""

    def array(self, state: Mapping[str, NDArray[Any]], name: str, like: NDArray[Any]) -> NDArray[Any]:
        """A checked copy of one array of a state: shape and dtype of ``like``."""
        found = state.get(name)
        if found is None or found.shape != like.shape or not np.issubdtype(found.dtype, np.number):
            raise PredictorError(
                f"predictor {self.name}: the saved state is not of this model (needs '{name}' of shape {like.shape})"
            )
        return np.ascontiguousarray(found, dtype=like.dtype)
