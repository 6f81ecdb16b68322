"""Adaptive replacement cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from cache.keys import ExpertKey
from cache.policies.base import Policy


class ARC(Policy):
    """Two LRU lists, of records used once and of those used again; misses on what left them move the border.

    The size of the cache, which the algorithm refers to, is the number of residents. The border moves when an event
    misses, before its victims are chosen.

    Source: Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003.
    """

    name = "arc"

    def __init__(self) -> None:
        self._once: OrderedDict[ExpertKey, None] = OrderedDict()  # least recently used first
        self._again: OrderedDict[ExpertKey, None] = OrderedDict()
        self._left_once: OrderedDict[ExpertKey, None] = OrderedDict()  # not resident: gone not long ago
        self._left_again: OrderedDict[ExpertKey, None] = OrderedDict()
        self._border = 0.0  # wanted length of the first list

    def record_event(self, keys: Sequence[ExpertKey]) -> None:
        for key in keys:
            if key in self._again:
                self._again.move_to_end(key)
            elif key in self._once:
                del self._once[key]
                self._again[key] = None
            elif key in self._left_once:
                step = max(1.0, len(self._left_again) / len(self._left_once))
                self._border = min(len(self._once) + len(self._again), self._border + step)
            elif key in self._left_again:
                self._border = max(0.0, self._border - max(1.0, len(self._left_once) / len(self._left_again)))

    def admit(self, key: ExpertKey) -> None:
        known = key in self._left_once or key in self._left_again
        self._left_once.pop(key, None)
        self._left_again.pop(key, None)
        (self._again if known else self._once)[key] = None

    def evict(self, key: ExpertKey) -> None:
        size = len(self._once) + len(self._again)
        if key in self._once:
            del self._once[key]
            self._left_once[key] = None
        else:
            del self._again[key]
            self._left_again[key] = None
        while self._left_once and len(self._once) + len(self._left_once) > size:
            self._left_once.popitem(last=False)
        while self._left_again and size - 1 + len(self._left_once) + len(self._left_again) > 2 * size:
            self._left_again.popitem(last=False)

    def victims(self, n: int, protected: Collection[ExpertKey], layer: int | None = None) -> list[ExpertKey] | None:
        def free(keys: OrderedDict[ExpertKey, None]) -> list[ExpertKey]:
            """The first ``n`` of ``keys`` that may go, the last to go first."""
            found: list[ExpertKey] = []
            for key in keys:
                if len(found) == n:
                    break
                if key not in protected and (layer is None or key.layer == layer):
                    found.append(key)
            return found[::-1]

        chosen: list[ExpertKey] = []
        once, again, length = free(self._once), free(self._again), len(self._once)
        while len(chosen) < n and (once or again):
            if once and (length > self._border or not again):
                chosen.append(once.pop())
                length -= 1
            else:
                chosen.append(again.pop())
        return chosen if len(chosen) >= n else None

    def resident(self) -> set[ExpertKey]:
        return {*self._once, *self._again}

    def check_integrity(self) -> None:
        lists = (self._once, self._again, self._left_once, self._left_again)
        assert sum(map(len, lists)) == len({key for keys in lists for key in keys}), "a record is in one list"
