"""The experts used most often so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.predictors.base import Predictor, PredictorContext, State


class Popularity(Predictor):
    """Those of the next layer with the most events, the lowest number of equals first; nobody that was never used."""

    name = "popularity"

    def __init__(self, context: PredictorContext) -> None:
        super().__init__(context)
        self._uses = np.zeros((len(self.layers), self.experts), np.int64)
        self._row = {layer: self._uses[number] for number, layer in enumerate(self.layers)}

    def record_event(self, layer: int, experts: Sequence[int], *, decode: bool) -> None:
        self._row[layer][list(experts)] += 1

    def predict(self, layer: int, limit: int, steps: int = 1) -> list[int]:
        uses = self._row[self.layer_after(layer, steps)]
        best: list[int] = np.argsort(-uses, kind="stable")[:limit].tolist()
        return [expert for expert in best if uses[expert] > 0]

    def state(self) -> State:
        return {"uses": self._uses.copy()}

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        self._uses[:] = self.array(state, "uses", self._uses)
