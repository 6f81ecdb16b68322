"""The next layer's own router, asked early: the runtime asks it and hands the answer in."""

from __future__ import annotations

from collections.abc import Sequence

from cache.predictors.base import Predictor, PredictorContext


class NextGatePrediction(Predictor):
    """Hands on what :meth:`hand_in` was given. A trace does not hold it, so it cannot be replayed from one.

    Source: Eliseev and Mazur, "Fast inference of Mixture-of-Experts language models with offloading", 2023.
    """

    name = "next-gate"

    def __init__(self, context: PredictorContext) -> None:
        super().__init__(context)
        self._handed: tuple[int, list[int]] | None = None

    def hand_in(self, layer: int, ranked: Sequence[int]) -> None:
        """The candidates for the layer after ``layer``, likeliest first."""
        self._handed = layer, list(ranked)

    def record_event(self, layer: int, experts: Sequence[int], *, decode: bool) -> None:
        pass

    def predict(self, layer: int, limit: int, steps: int = 1) -> list[int]:
        if self._handed is None or self._handed[0] != layer or steps != 1:
            return []
        return self._handed[1][:limit]
