"""``--prefetch auto``: prefetches where tokens come faster for it, and not where they do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from cache.events import Events
from offload.events import PrefetchTrial
from offload.model.prefetch.base import Guess, Prefetcher
from offload.model.prefetch.foretold import Foretold
from offload.model.prefetch.next_gate import NextGate
from offload.model.prefetch.trial import Trial
from offload.model.transformers_api import ExpertsModule


class AutoPrefetch(Prefetcher):
    """Runs the prefetch that a :class:`Trial` of tokens/s says, or none.

    Candidates are ``next-gate``, where the routers have the usual form, and ``layer-markov``. The latter is taught
    only while it is tested or used: that takes time, too.
    """

    def __init__(self, model: torch.nn.Module, modules: Sequence[ExpertsModule], earlier: Events | None = None) -> None:
        super().__init__()
        self._candidates: dict[str, Prefetcher] = {}
        gate = NextGate(model, modules)
        if gate.can_predict:
            self._candidates["next-gate"] = gate
        self._candidates["layer-markov"] = Foretold("layer-markov", modules, earlier)
        self._trial = Trial(list(self._candidates))

    def record_event(self, layer: int, experts: Sequence[int], *, decode: bool) -> None:
        for name, candidate in self._candidates.items():
            if name == self._trial.arm or not self._trial.resting:
                candidate.record_event(layer, experts, decode=decode)

    def guesses(self, layer: int, hidden: torch.Tensor, limit: int) -> Iterator[Guess]:
        current = self._candidates.get(self._trial.arm)
        if current is None:
            return iter(())
        self.worth = current.worth
        return current.guesses(layer, hidden, limit)

    @property
    def rests(self) -> bool:
        return self._trial.arm not in self._candidates

    def end_token(self, seconds: float) -> None:
        self._trial.record(seconds)

    def setting_changed(self) -> None:
        self._trial.restart()

    @property
    def trial(self) -> PrefetchTrial:
        return self._trial.report
