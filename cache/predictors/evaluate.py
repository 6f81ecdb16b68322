"""How well a predictor foretells a trace: recall and precision at m."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.events import Events
from cache.predictors import PredictorContext, make_predictor


@dataclass(frozen=True, slots=True)
class PredictionScore:
    """Counts for the best ``m`` guesses, [L] each: by the layer that was foretold, in the order of ``layers``.

    ``wanted`` are the experts of the foretold events, ``guessed`` the guesses, ``right`` those that were wanted.
    """

    m: int
    layers: tuple[int, ...]
    wanted: NDArray[np.int64]
    guessed: NDArray[np.int64]
    right: NDArray[np.int64]

    @property
    def recall(self) -> float | None:
        """Share of the wanted experts that were among the guesses; None if none were wanted."""
        return _share(self.right, self.wanted)

    @property
    def precision(self) -> float | None:
        """Share of the guesses that were wanted; None if there were none."""
        return _share(self.right, self.guessed)


def evaluate(
    name: str, events: Events, experts: int, limits: Sequence[int], training: Events | None = None
) -> list[PredictionScore]:
    """Score predictor ``name`` on ``events``, once for each number of guesses in ``limits``.

    Every decode event that comes right after one of the layer before it is foretold, and then learned from;
    ``training`` is learned from first. ``experts`` is the most that a layer has. Raises PredictorError.
    """
    layers = tuple(sorted({*events.layers(), *(training.layers() if training is not None else ())}))
    predictor = make_predictor(name, PredictorContext(layers, experts, events))
    if training is not None and not predictor.simulation_only:
        for layer, decode, chosen in zip(
            training.layer.tolist(), training.decode.tolist(), training.sets(), strict=True
        ):
            predictor.record_event(layer, chosen, decode=decode)
    row = {layer: number for number, layer in enumerate(layers)}
    counts = np.zeros((3, len(limits), len(layers)), np.int64)
    guesses: list[int] | None = None
    foretold = -1
    for layer, decode, chosen in zip(events.layer.tolist(), events.decode.tolist(), events.sets(), strict=True):
        if guesses is not None and decode and layer == foretold:
            wanted = set(chosen)
            for number, limit in enumerate(limits):
                some = guesses[:limit]
                counts[:, number, row[layer]] += len(chosen), len(some), len(wanted.intersection(some))
        predictor.record_event(layer, chosen, decode=decode)
        guesses = predictor.predict(layer, max(limits)) if decode else None
        foretold = predictor.layer_after(layer)
    return [PredictionScore(limit, layers, *counts[:, number]) for number, limit in enumerate(limits)]


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> float | None:
    return int(part.sum()) / int(whole.sum()) if whole.sum() else None
