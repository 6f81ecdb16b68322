"""What rows that decode together are almost sure to take of the next layer (docs/batch.md, Reading ahead)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from cache.expert_cache import ExpertCache, Lookup, SlotState
from cache.guesses import SureGuesses
from cache.read_ahead import ReadAhead
from offload.model.prefetch.next_gate import ranked
from offload.model.transformers_api import ExpertsModule, find_router


class RowGuesses:
    """Asks the next layer's router early, row by row, and learns which answers are sure. For the engine thread.

    Layers whose router has another form than a matrix are not foretold.
    """

    def __init__(self, model: torch.nn.Module, modules: Sequence[ExpertsModule], cache: ExpertCache) -> None:
        routers = ((found.layer, find_router(model, found)) for found in modules)
        self._routers = {layer: router for layer, router in routers if router is not None}
        self._cache = cache
        self._sure = SureGuesses()

    def expect(self, reading: ReadAhead, layer: int, hidden: torch.Tensor, top_k: int, found: Lookup) -> None:
        """Have ``reading`` read ahead for the layer after ``layer``, if there is one and it is not read as a whole.

        ``hidden`` [T, H] is what the experts of ``layer`` get, a row for each token that decodes, of which each takes
        ``top_k``; ``found`` is their event.
        """
        after = reading.after(layer)
        if after is None or reading.aims:
            return
        guesses = self.of(after, hidden, top_k)
        keys = self._cache.keys(after, {expert for row in guesses for expert in row})
        absent = {key.expert for key in keys if self._cache.state(key) is SlotState.EMPTY}
        loads = len(found.pending) + len(found.misses)
        reading.expect(after, self._sure.choose(after, guesses, absent, loads))

    def record_event(self, layer: int, rows: Sequence[Collection[int]] | None) -> None:
        """See :meth:`cache.guesses.SureGuesses.record_event`."""
        self._sure.record_event(layer, rows)

    def of(self, layer: int, hidden: torch.Tensor, limit: int) -> list[list[int]]:
        """The ``limit`` likeliest experts of ``layer`` for each token, best first; nothing if its router cannot be
        asked."""
        router = self._routers.get(layer)
        if router is None or router.weight.shape[1] != hidden.shape[1]:
            return []
        return [[expert for expert in row if expert < router.experts] for row in ranked(router, hidden, limit)]
