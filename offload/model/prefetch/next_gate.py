"""Predicts the experts of the next layers: their routers, applied to what this layer's experts get.

The residual stream changes little from layer to layer, so the guess is right for 60 to 90 % of the experts of the next
layer with no training, and for fewer of the one after it. What the next token brings, no router can tell before it is
known: its first layers are expected to take what they took for this one. Of several tokens, rows of a batch, only
the next layer is foretold.

Source: Eliseev and Mazur, "Fast inference of Mixture-of-Experts language models with offloading", 2023 (speculative
expert loading).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import torch

from cache.predictors import PREFETCH_LAYERS, layers_ahead
from offload.model.prefetch.base import Guess, Prefetcher, most_wanted
from offload.model.transformers_api import ExpertsModule, Router, find_router


class NextGate(Prefetcher):
    """Routers by layer. Layers whose router has another form than a matrix are not predicted."""

    def __init__(self, model: torch.nn.Module, modules: Sequence[ExpertsModule]) -> None:
        super().__init__()
        ordered = sorted(modules, key=lambda found: found.layer)
        routers = [(found.layer, find_router(model, found)) for found in ordered]
        self._layers = [found.layer for found in ordered]
        self._routers = {layer: router for layer, router in routers if router is not None}
        self._before: dict[int, list[int]] = {}  # what the first layers took for the last token

    @property
    def can_predict(self) -> bool:
        """Whether any layer but the first has a router of the usual form."""
        return any(layer in self._routers for layer in self._layers[1:])

    def record_event(self, layer: int, experts: Sequence[int], *, decode: bool) -> None:
        if layer in self._layers[:PREFETCH_LAYERS]:
            self._before[layer] = list(experts)
        self.worth.record_event(layer, experts, decode=decode)

    def guesses(self, layer: int, hidden: torch.Tensor, limit: int) -> Iterator[Guess]:
        place = bisect.bisect_left(self._layers, layer)
        for after in range(place + 1, place + 1 + layers_ahead(len(hidden))):
            number = self._layers[after % len(self._layers)]
            if after < len(self._layers):
                router = self._routers.get(number)
                if router is not None and router.weight.shape[1] == hidden.shape[1]:
                    yield number, _likeliest(router, hidden, limit)
            elif len(hidden) == 1 and (before := self._before.get(number)):
                yield number, before[:limit]


def _likeliest(router: Router, hidden: torch.Tensor, limit: int) -> list[int]:
    return [expert for expert in most_wanted(ranked(router, hidden, limit)) if expert < router.experts]


def ranked(router: Router, hidden: torch.Tensor, limit: int) -> list[list[int]]:
    """The ``limit`` likeliest choices of ``router`` for each token of ``hidden`` [T, H], best first."""
    scores = torch.nn.functional.linear(hidden, router.weight.to(hidden.dtype), None).float()
    if router.correction is not None:  # it moves the choice, not the weights: families with a sigmoid router
        scores = scores.sigmoid() + router.correction
    best: list[list[int]] = scores.topk(min(limit, scores.shape[1])).indices.tolist()
    return best
