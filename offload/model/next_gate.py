"""Predicts the experts of the next layer: its router, applied to what this layer's experts get.

The residual stream changes little from layer to layer, so the guess is right for 60 to 90 % of the experts with no
training. Source: Eliseev and Mazur, "Fast inference of Mixture-of-Experts language models with offloading", 2023
(speculative expert loading).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from offload.model.transformers_api import ExpertsModule, find_router


class NextGate:
    """Routers by the layer before them. Layers whose router has another form than a matrix are not predicted."""

    def __init__(self, model: torch.nn.Module, modules: list[ExpertsModule]) -> None:
        ordered = sorted(modules, key=lambda found: found.layer)
        self._next = {
            now.layer: (after.layer, router)
            for now, after in itertools.pairwise(ordered)
            if (router := find_router(model, after)) is not None
        }

    def record_event(self, layer: int, experts: Sequence[int], *, decode: bool) -> None:
        """Nothing to learn: the routers know."""

    def predict(self, layer: int, hidden: torch.Tensor, top_k: int) -> tuple[int, list[int]] | None:
        """The next layer's number and its likeliest experts, best first, for ``hidden`` [1, H].

        Half of ``top_k``: three in four of these are used, but only one in two of the others (docs/performance.md).
        None after the last layer, and where there is nothing to predict with.
        """
        found = self._next.get(layer)
        if found is None or found[1].weight.shape[1] != hidden.shape[1]:
            return None
        after, router = found
        scores = torch.nn.functional.linear(hidden, router.weight.to(hidden.dtype), None)[0].float()
        if router.correction is not None:  # it moves the choice, not the weights: families with a sigmoid router
            scores = scores.sigmoid() + router.correction
        best = scores.topk(max(1, min(top_k // 2, len(scores)))).indices.tolist()
        return after, [expert for expert in best if expert < router.experts]
