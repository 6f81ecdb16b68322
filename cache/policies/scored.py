"""Shared ground of the policies that give up the record with the lowest score."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Sequence
from typing import ClassVar

from cache.keys import ExpertKey
from cache.policies.base import Policy


class ScoredPolicy(Policy):
    """Keeps resident keys in a heap by ``(score, time of the score)``, lowest first.

    Each resident has a live entry; those in the heap that are not live are stale. Where scores only grow
    (``growing``) a use changes the live entry alone: its key's entry in the heap is too low, so it comes to the top
    in time and is put right there. Elsewhere every use pushes an entry; stale ones are dropped when they come to the
    top, and the heap is rebuilt when they outnumber the live ones, so that an access costs O(log n) amortised.
    Subclasses keep a score for every expert ever seen, resident or not: an expert that comes back keeps its history,
    and the number of experts bounds the memory.
    """

    growing: ClassVar[bool] = False

    def __init__(self) -> None:
        self._entry: dict[ExpertKey, tuple[float, int]] = {}  # live entry of each resident key
        self._heap: list[tuple[float, int, ExpertKey]] = []
        self._admitted: dict[ExpertKey, int] = {}  # the tick of each resident's first entry since it came
        self._ticks = 0

    def score(self, key: ExpertKey) -> float:
        """The present score of ``key``; scores are only compared with each other."""
        raise NotImplementedError

    def update_scores(self, keys: Sequence[ExpertKey]) -> None:
        """Take in one event. Every key's score may only change here."""
        raise NotImplementedError

    def record_event(self, keys: Sequence[ExpertKey]) -> None:
        self.update_scores(keys)
        entries = self._entry
        if self.growing:
            score, ticks = self.score, self._ticks
            for key in keys:
                if key in entries:
                    ticks += 1
                    entries[key] = (score(key), ticks)
            self._ticks = ticks
        else:
            for key in keys:
                if key in entries:
                    self._push(key)

    def admit(self, key: ExpertKey) -> None:
        self._admitted[key] = self._ticks + 1
        self._push(key)

    def evict(self, key: ExpertKey) -> None:
        del self._entry[key]
        del self._admitted[key]
        if len(self._heap) > 2 * len(self._entry) + 64:  # many went and none came
            self._rebuild()

    def victims(self, n: int, protected: Collection[ExpertKey], layer: int | None = None) -> list[ExpertKey] | None:
        chosen: list[ExpertKey] = []
        kept: list[tuple[float, int, ExpertKey]] = []
        heap, entries = self._heap, self._entry
        while heap and len(chosen) < n:
            item = heap[0]
            key = item[2]
            live = entries.get(key)
            if live != item[:2]:
                if live is not None and self.growing and item[1] >= self._admitted[key]:
                    heapq.heapreplace(heap, (*live, key))
                else:
                    heapq.heappop(heap)
                continue
            heapq.heappop(heap)
            kept.append(item)
            if key not in protected and (layer is None or key.layer == layer):
                chosen.append(key)
        for item in kept:
            heapq.heappush(heap, item)
        return chosen if len(chosen) >= n else None

    def resident(self) -> set[ExpertKey]:
        return set(self._entry)

    def score_now(self, key: ExpertKey) -> float | None:
        return self.score(key)

    def check_integrity(self) -> None:
        assert self._admitted.keys() == self._entry.keys(), "residents are known in both places"
        found = Counter(key for _, tick, key in self._heap if tick >= self._admitted.get(key, self._ticks + 1))
        if self.growing:
            assert found == Counter(list(self._entry)), "every resident key has exactly one entry since it came"
            low = all((score, tick) <= self._entry[key] for score, tick, key in self._heap if key in self._entry)
            assert low, "and none is too high"
        else:
            live = [item for item in self._heap if self._entry.get(item[2]) == item[:2]]
            assert len(live) == len(self._entry), "every resident key has exactly one live heap entry"
        assert len(self._heap) <= 2 * len(self._entry) + 64, "stale heap entries are bounded"

    def _push(self, key: ExpertKey) -> None:
        self._ticks += 1
        entry = (self.score(key), self._ticks)  # equal scores: the older touch goes first
        self._entry[key] = entry
        if len(self._heap) >= 2 * len(self._entry) + 64:
            self._rebuild()
        else:
            heapq.heappush(self._heap, (*entry, key))

    def _rebuild(self) -> None:
        """Leave out the stale entries."""
        self._heap = [(*live, key) for key, live in self._entry.items()]
        heapq.heapify(self._heap)
