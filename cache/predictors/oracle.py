"""Knows what comes next, or a share of it: the most that any predictor can give, and what one of some recall can."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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


class Recalling(Oracle):
    """An oracle that is wrong as often as a predictor of a given recall: ``oracle:0.75``.

    It guesses as many experts as the event takes. Each of them is right with the probability ``recall`` (its square for
    the layer after the next, and so on), whatever its rank and whether it is resident; a wrong guess is any other
    expert of the layer. A real router is righter in its first guesses and wrong in ones that are often resident.
    """

    def __init__(self, context: PredictorContext, recall: str) -> None:
        super().__init__(context)
        try:
            self._recall = float(recall)
        except ValueError:
            self._recall = -1.0
        if not 0 < self._recall <= 1:
            raise PredictorError(f"predictor oracle: the recall must be above 0 and at most 1, not {recall}")

    def predict(self, layer: int, limit: int, steps: int = 1) -> list[int]:
        wanted = super().predict(layer, self.experts, steps)
        return with_recall(wanted, self.experts, self._recall**steps, (self._event, steps))[:limit]


def with_recall(wanted: Sequence[int], experts: int, recall: float, seed: Sequence[int]) -> list[int]:
    """``wanted``, of which each is kept with the probability ``recall``, else replaced by one that is not wanted."""
    random = np.random.default_rng(seed)
    right = random.random(len(wanted)) < recall
    wrong = (expert for expert in random.permutation(experts).tolist() if expert not in wanted)
    return [expert if hit else next(wrong, expert) for expert, hit in zip(wanted, right, strict=True)]
