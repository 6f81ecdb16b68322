"""Which records a pass of many tokens loads before the event that takes them: one rule for the runtime and the replay.

A pass over hundreds of tokens takes nearly all experts of every layer, so there is no need to wait for a router: while
the last experts of a layer are computed and the attention of the next one runs, the lanes load what that layer lacks.
Where events use fewer experts nothing is read ahead, but what somebody says who knows (:meth:`ReadAhead.expect`): of
rows that decode together the routers tell what is almost sure (:class:`cache.guesses.SureGuesses`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cache.expert_cache import ExpertCache
from cache.keys import ExpertKey
from cache.outcomes import Lookup, Reservation, SlotState

FULL = 15 / 16
"""Share of a layer's experts that an event must use for the next one to be taken to use all."""


class ReadAhead:
    """What is read ahead for the passes of one cache, whose layers run in ascending order, and what is on its way.

    Calls come in the order of the run: :meth:`begin_pass`, then for each event :meth:`take` and :meth:`begin_event`
    after its lookup, and :meth:`reserve` whenever a slot may have come free. What was read ahead stays loading until an
    event of its layer: what counts as a hit must not depend on when a read ends.
    """

    def __init__(self, cache: ExpertCache, experts: Mapping[int, int]) -> None:
        """``experts``: how many each layer has."""
        self.coming: dict[ExpertKey, None] = {}  # in the order of their loads
        self.taken: list[ExpertKey] = []  # by the open event: computed first, so that others get their slots
        self._cache = cache
        self._experts = experts
        layers = sorted(experts)
        self._first = layers[0] if layers else None
        self._after = dict(zip(layers, [*layers[1:], None], strict=False))
        self._full_from: int | None = None  # tokens with which an event used nearly all experts
        self._layer: int | None = None  # read ahead for this one
        self._wanted: list[ExpertKey] | None = None  # what it lacks, if that was looked up
        self._said = False  # whether somebody said so

    @property
    def aims(self) -> bool:
        """Whether :meth:`reserve` may give something."""
        return self._layer is not None

    @property
    def waits(self) -> bool:
        """Whether it would start loads, had it slots for them."""
        return self._layer is not None and (self._wanted is None or bool(self._wanted))

    def begin_pass(self, tokens: int) -> None:
        """A pass over so many tokens begins: if as many used all experts before, those of the first layer are due."""
        self._aim(self._first if self._full_from is not None and tokens >= self._full_from else None)

    def take(self, found: Lookup) -> Lookup:
        """An event's lookup, with what was read ahead for it first among what is pending, in the order of the loads.

        These (:attr:`taken`) are the event's own loads from here on.
        """
        self.taken = []
        if not self.coming or not found.pending:
            return found
        pending = dict.fromkeys(found.pending)
        self.taken = [key for key in self.coming if key in pending]
        for key in self.taken:
            del self.coming[key], pending[key]
        return found._replace(pending=[*self.taken, *pending])

    def begin_event(self, layer: int, experts: int, tokens: int, recent: Sequence[Sequence[int]] | None) -> None:
        """An event of ``layer`` with so many distinct experts; ``recent`` as in :meth:`ExpertCache.lookup`.

        After the last layer comes the first one, if no token of the pass is the last of its prompt.
        """
        if recent is None:
            self._aim(None)
            return
        full = experts >= FULL * self._experts[layer]
        if full:
            self._full_from = tokens if self._full_from is None else min(self._full_from, tokens)
        elif self._full_from is not None and tokens >= self._full_from:
            self._full_from = tokens + 1
        after = self._after[layer]
        if after is None and not recent:
            after = self._first
        self._aim(after if full and after != layer else None)

    def after(self, layer: int) -> int | None:
        """The layer whose event comes next in the same pass; None after the last."""
        return self._after.get(layer)

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """The next event, which is of ``layer``, is almost sure to take these ``experts``, the surest first."""
        self._aim(layer)
        self._said = True
        self._wanted = [key for key in self._cache.keys(layer, experts) if self._cache.state(key) is SlotState.EMPTY]

    def reserve(self) -> list[Reservation]:
        """Slots for loads that should start now; maybe none. Only when all loads of the open event have theirs."""
        if self._layer is None or not self.waits:
            return []
        if self._wanted is None:
            keys = self._cache.keys(self._layer, range(self._experts[self._layer]))
            self._wanted = [key for key in keys if self._cache.state(key) is SlotState.EMPTY]
        elif self._said:  # a prefetch may have been quicker
            self._wanted = [key for key in self._wanted if self._cache.state(key) is SlotState.EMPTY]
        loads = self._cache.reserve_next(self._wanted)
        del self._wanted[: len(loads)]
        self.coming.update((load.key, None) for load in loads)
        return loads

    def left(self, layer: int) -> list[ExpertKey]:
        """What was read ahead for ``layer`` and its event did not take."""
        return [key for key in self.coming if key.layer == layer]

    def forget(self, key: ExpertKey) -> None:
        """``key`` is not on its way any more, if it was."""
        self.coming.pop(key, None)

    def stop(self) -> None:
        """Read nothing ahead until the next event."""
        self._aim(None)

    def clear(self) -> None:
        """Nothing is on its way any more."""
        self.coming.clear()
        self.stop()

    def _aim(self, layer: int | None) -> None:
        self._layer, self._wanted, self._said = layer, None, False
