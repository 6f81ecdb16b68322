"""Prefetches by the predictors that go by the events alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from cache.events import Events
from cache.predictors import PredictorContext, layers_ahead, make_predictor
from offload.model.prefetch.base import Guess, Prefetcher
from offload.model.transformers_api import ExpertsModule


class Foretold(Prefetcher):
    """``name`` is that of the predictor, which learns from ``earlier`` events first."""

    def __init__(self, name: str, modules: Sequence[ExpertsModule], earlier: Events | None = None) -> None:
        super().__init__()
        layers = tuple(sorted(module.layer for module in modules))
        context = PredictorContext(layers, max(module.num_experts for module in modules))
        self._predictor = make_predictor(name, context)
        if earlier is not None:
            rows = zip(earlier.layer.tolist(), earlier.decode.tolist(), earlier.sets(), strict=True)
            for layer, decode, experts in rows:
                self._predictor.record_event(layer, experts, decode=decode)

    def record_event(self, layer: int, experts: Sequence[int], *, decode: bool) -> None:
        self._predictor.record_event(layer, experts, decode=decode)
        self.worth.record_event(layer, experts, decode=decode)

    def guesses(self, layer: int, hidden: torch.Tensor, limit: int) -> Iterator[Guess]:
        limit *= len(hidden)
        for steps in range(1, layers_ahead(len(hidden)) + 1):
            if experts := self._predictor.predict(layer, limit, steps):
                yield self._predictor.layer_after(layer, steps), experts
