"""Predictors by name: what will the next event need?"""

from __future__ import annotations

from cache.predictors.base import Predictor, PredictorContext, PredictorError, State
from cache.predictors.layer_markov import LayerMarkov
from cache.predictors.next_gate import NextGatePrediction
from cache.predictors.oracle import Oracle, Recalling
from cache.predictors.popularity import Popularity
from cache.predictors.previous_token import PreviousToken

PREDICTORS: dict[str, type[Predictor]] = {
    predictor.name: predictor for predictor in (NextGatePrediction, LayerMarkov, PreviousToken, Popularity, Oracle)
}

PREFETCH_LAYERS = 2
"""How many layers ahead records are prefetched: the one after the next only while few prefetches are under way."""

__all__ = [
    "PREDICTORS",
    "PREFETCH_LAYERS",
    "NextGatePrediction",
    "Predictor",
    "PredictorContext",
    "PredictorError",
    "State",
    "layers_ahead",
    "make_predictor",
    "runtime_predictors",
]


def layers_ahead(tokens: int) -> int:
    """How many layers ahead records are prefetched in a pass in which so many tokens decode.

    Several tokens read so much that the disk has time for one layer's guesses, and of those beyond the next layer too
    many are wrong (docs/batch.md).
    """
    return PREFETCH_LAYERS if tokens == 1 else 1


def runtime_predictors() -> list[str]:
    """The names of the predictors that do not need to know the future."""
    return [name for name, predictor in PREDICTORS.items() if not predictor.simulation_only]


def make_predictor(name: str, context: PredictorContext) -> Predictor:
    """A fresh predictor; ``oracle:R`` is one that is right in a share of R.

    Raises PredictorError for an unknown name; the message says which there are.
    """
    kind, _, recall = name.partition(":")
    if kind == Oracle.name and recall:
        return Recalling(context, recall)
    if name not in PREDICTORS:
        raise PredictorError(f"unknown predictor '{name}'; there are {', '.join(runtime_predictors())}")
    return PREDICTORS[name](context)
