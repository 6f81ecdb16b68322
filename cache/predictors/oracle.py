"""Knows what comes next: the most that any predictor can give."""

from __future__ import annotations

from collections.abc import Sequence

from cache.predictors.base import Predictor, PredictorContext, PredictorError


class Oracle(Predictor):
    """The experts of the event itself, by rank; nothing after the last, or if another layer's event comes."""

    name = "oracle"
    simulation_only = True

    def __init__(self, context: PredictorContext) -> None:
        super().__init__(context)
        if context.future is None:
            raise PredictorError("predictor oracle needs to know the future: it is for replay and tune")
        self._layers: list[int] = context.future.layer.tolist()
        self._sets = context.future.sets()
        self._event = 0  # the next one

    def record_event(self, layer: int, experts: Sequence[int], *, decode: bool) -> None:
        self._event += 1

    def predict(self, layer: int, limit: int, steps: int = 1) -> list[int]:
        event = self._event + steps - 1
        if event >= len(self._sets) or self._layers[event] != self.layer_after(layer, steps):
            return []
        return self._sets[event][:limit]
