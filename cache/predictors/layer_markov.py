"""Which experts of a layer follow which of the layer before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.predictors.base import Predictor, PredictorContext, State

_MOST = np.iinfo(np.uint16).max - 1


class LayerMarkov(Predictor):
    """A table of pairs for each two consecutive layers, from all decoded tokens so far, with one count in advance.

    The score of an expert is the sum, over the experts that the layer before chose, of its share of their followers.
    A layer further on follows from those foretold for the layer before it.
    Counts have 16 bits and are halved before they overflow: L x E x E x 2 bytes in all.

    Source: the transition tables of Yao et al., "Exploiting inter-layer expert affinity for accelerating
    Mixture-of-Experts model inference", 2024 (ExFlow), learned online.
    """

    name = "layer-markov"

    def __init__(self, context: PredictorContext) -> None:
        super().__init__(context)
        self._pairs = np.zeros((len(self.layers), self.experts, self.experts), np.uint16)  # [from layer, from, to]
        self._totals = np.full((len(self.layers), self.experts), float(self.experts))
        self._row = {layer: number for number, layer in enumerate(self.layers)}
        self._last: tuple[int, list[int]] | None = None  # layer and experts of the event before

    def record_event(self, layer: int, experts: Sequence[int], *, decode: bool) -> None:
        last, self._last = self._last, ((layer, list(experts)) if decode and experts else None)
        if last is None or not decode or not experts or self.layer_after(last[0]) != layer:
            return
        row, before = self._row[last[0]], last[1]
        table = self._pairs[row]
        block = np.ix_(before, experts)
        counts = table[block] + 1
        table[block] = counts
        self._totals[row, before] += len(experts)
        if counts.max() >= _MOST:
            table //= 2
            self._totals[row] = table.sum(1, dtype=np.float64) + self.experts

    def predict(self, layer: int, limit: int, steps: int = 1) -> list[int]:
        if self._last is None or self._last[0] != layer:
            return []
        best = self._last[1]
        for _ in range(steps):
            row = self._row[layer]
            shares = (self._pairs[row, best] + 1.0) / self._totals[row, best, None]
            best = np.argsort(-shares.sum(0), kind="stable")[:limit].tolist()
            layer = self.layer_after(layer)
        return best

    def state(self) -> State:
        return {"pairs": self._pairs.copy()}

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        self._pairs[:] = self.array(state, "pairs", self._pairs)
        self._totals[:] = self._pairs.sum(2, dtype=np.float64) + self.experts
        self._last = None
