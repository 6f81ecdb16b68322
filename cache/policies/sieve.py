"""SIEVE: lazy promotion, quick demotion."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain

from cache.keys import ExpertKey
from cache.policies.queued import QueuedPolicy, Skip, Step

_SPARE, _KEEP = "spare", "keep"  # the mark goes; a protected key keeps its own


class Sieve(QueuedPolicy):
    """A hand goes from the oldest record to the newest, spares those used since it last came by, takes the first other.

    The hand cuts the queue in two: what it has passed in this round, and what lies ahead. New records go to the end of
    the queue, so the hand meets them before it starts again with the oldest.

    Source: Zhang et al., "SIEVE is simpler than LRU: an efficient turn-key eviction algorithm for web caches", NSDI
    2024.
    """

    name = "sieve"

    def __init__(self) -> None:
        super().__init__()
        self._passed: OrderedDict[ExpertKey, bool] = OrderedDict()  # oldest first -> used since the hand came by
        self._ahead: OrderedDict[ExpertKey, bool] = OrderedDict()

    def record_event(self, keys: Sequence[ExpertKey]) -> None:
        for key in keys:
            if key in self._ahead:
                self._ahead[key] = True
            elif key in self._passed:
                self._passed[key] = True

    def admit(self, key: ExpertKey) -> None:
        self._ahead[key] = False

    def search(self, skip: Skip) -> Iterator[Step]:
        again = []
        for key, used in chain(self._ahead.items(), self._passed.items()):
            if skip(key):
                yield Step(key, _KEEP)
            elif used:
                again.append(key)
                yield Step(key, _SPARE)
            else:
                yield Step(key)
        for key in again:  # the second round; what was protected is passed without a change
            yield Step(key)

    def change(self, step: Step) -> None:
        used = self._ahead.pop(step.key)
        self._passed[step.key] = used and step.change == _KEEP
        self._turn()

    def remove(self, key: ExpertKey) -> None:
        (self._ahead if key in self._ahead else self._passed).pop(key)
        self._turn()

    def resident(self) -> set[ExpertKey]:
        return {*self._ahead, *self._passed}

    def check_integrity(self) -> None:
        assert not self._ahead.keys() & self._passed.keys(), "a record is ahead of the hand or was passed"
        assert self._ahead or not self._passed, "the hand starts again at the end"

    def _turn(self) -> None:
        """At the end of the queue the hand goes back to the oldest record."""
        if not self._ahead:
            self._ahead, self._passed = self._passed, self._ahead
