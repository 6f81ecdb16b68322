"""Shared ground of the policies that give up the record with the lowest score."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence

from cache.keys import ExpertKey
from cache.policies.base import Policy


class ScoredPolicy(Policy):
    """Keeps resident keys in a heap by ``(score, time of the score)``, lowest first.

    A changed score pushes a new entry and leaves the old one behind as stale; stale entries are dropped when they
    come to the top, and the heap is rebuilt when they outnumber the live ones, so that an access costs O(log n)
    amortised. Subclasses keep a score for every expert ever seen, resident or not: an expert that comes back keeps
    its history, and the number of experts bounds the memory.
    """

    def __init__(self) -> None:
        self._entry: dict[ExpertKey, tuple[float, int]] = {}  # live entry of each resident key
        self._heap: list[tuple[float, int, ExpertKey]] = []
        self._ticks = 0

    def score(self, key: ExpertKey) -> float:
        """The present score of ``key``; scores are only compared with each other."""
        raise NotImplementedError

    def update_scores(self, keys: Sequence[ExpertKey]) -> None:
        """Take in one event. Every key's score may only change here."""
        raise NotImplementedError

    def record_event(self, keys: Sequence[ExpertKey]) -> None:
        self.update_scores(keys)
        for key in keys:
            if key in self._entry:
                self._push(key)

    def admit(self, key: ExpertKey) -> None:
        self._push(key)

    def evict(self, key: ExpertKey) -> None:
        del self._entry[key]

    def victims(self, n: int, protected: Collection[ExpertKey], layer: int | None = None) -> list[ExpertKey] | None:
        chosen: list[ExpertKey] = []
        kept: list[tuple[float, int, ExpertKey]] = []
        while self._heap and len(chosen) < n:
            item = heapq.heappop(self._heap)
            key = item[2]
            if self._entry.get(key) != item[:2]:
                continue
            kept.append(item)
            if key not in protected and (layer is None or key.layer == layer):
                chosen.append(key)
        for item in kept:
            heapq.heappush(self._heap, item)
        return chosen if len(chosen) >= n else None

    def resident(self) -> set[ExpertKey]:
        return set(self._entry)

    def check_integrity(self) -> None:
        live = [item for item in self._heap if self._entry.get(item[2]) == item[:2]]
        assert len(live) == len(self._entry), "every resident key has exactly one live heap entry"
        assert len(self._heap) <= 2 * len(self._entry) + 64, "stale heap entries are bounded"

    def _push(self, key: ExpertKey) -> None:
        self._ticks += 1
        entry = (self.score(key), self._ticks)  # equal scores: the older touch goes first
        self._entry[key] = entry
        if len(self._heap) >= 2 * len(self._entry) + 64:
            self._heap = [(*live, k) for k, live in self._entry.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (*entry, key))
