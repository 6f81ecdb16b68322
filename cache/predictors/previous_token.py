"""The experts that the layer used last time."""

from __future__ import annotations

from collections.abc import Sequence

from cache.predictors.base import Predictor, PredictorContext


class PreviousToken(Predictor):
    """Those of the next layer's last event, by rank: a token often takes experts of the one before it."""

    name = "previous-token"

    def __init__(self, context: PredictorContext) -> None:
        super().__init__(context)
        self._last: dict[int, list[int]] = {}

    def record_event(self, layer: int, experts: Sequence[int], *, decode: bool) -> None:
        self._last[layer] = list(experts)

    def predict(self, layer: int, limit: int, steps: int = 1) -> list[int]:
        return self._last.get(self.layer_after(layer, steps), [])[:limit]
