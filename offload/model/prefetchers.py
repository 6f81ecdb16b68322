"""What a prefetch goes by: the predictors by name, as the experts function asks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from cache.events import Events
from cache.predictors import Predictor, PredictorContext, make_predictor, runtime_predictors
from offload.model.next_gate import NextGate
from offload.model.transformers_api import ExpertsModule


class Prefetcher(Protocol):
    """Told of every event, and asked after those of decoded tokens."""

    def record_event(self, layer: int, experts: Sequence[int], *, decode: bool) -> None: ...

    def predict(self, layer: int, hidden: torch.Tensor, top_k: int) -> tuple[int, list[int]] | None:
        """The number of the layer after ``layer`` and its likeliest experts, best first, for ``hidden`` [1, H].

        Half of ``top_k``: three in four of these are used, but only one in two of the others (docs/performance.md).
        None where there is nothing to go by.
        """
        ...


class Foretold:
    """A predictor that goes by the events alone."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.record_event = predictor.record_event

    def predict(self, layer: int, hidden: torch.Tensor, top_k: int) -> tuple[int, list[int]] | None:
        experts = self.predictor.predict(layer, max(1, top_k // 2))
        return (self.predictor.layer_after(layer), experts) if experts else None


def make_prefetcher(
    name: str, model: torch.nn.Module, modules: list[ExpertsModule], earlier: Events | None = None
) -> Prefetcher | None:
    """What ``--prefetch name`` goes by, once it has learned from ``earlier`` events; None for ``off``."""
    makers: dict[str, Callable[[], Prefetcher]] = {"next-gate": lambda: NextGate(model, modules)}
    if name == "off":
        return None
    if name in makers:
        return makers[name]()
    assert name in runtime_predictors()
    layers = tuple(sorted(module.layer for module in modules))
    context = PredictorContext(layers, max(module.num_experts for module in modules))
    predictor = make_predictor(name, context)
    if earlier is not None:
        for layer, decode, experts in zip(earlier.layer.tolist(), earlier.decode.tolist(), earlier.sets(), strict=True):
            predictor.record_event(layer, experts, decode=decode)
    return Foretold(predictor)
