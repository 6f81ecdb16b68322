"""Least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from cache.keys import ExpertKey
from cache.policies.base import Policy


class LRU(Policy):
    """Gives up the record whose last event is the longest ago."""

    name = "lru"

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()  # least recently used first

    def record_event(self, keys: Sequence[ExpertKey]) -> None:
        for key in keys:
            if key in self._order:
                self._order.move_to_end(key)

    def admit(self, key: ExpertKey) -> None:
        self._order[key] = None

    def evict(self, key: ExpertKey) -> None:
        del self._order[key]

    def victims(self, n: int, protected: Collection[ExpertKey], layer: int | None = None) -> list[ExpertKey] | None:
        chosen: list[ExpertKey] = []
        if n <= 0:
            return chosen
        for key in self._order:
            if key not in protected and (layer is None or key.layer == layer):
                chosen.append(key)
                if len(chosen) == n:
                    return chosen
        return None

    def resident(self) -> set[ExpertKey]:
        return set(self._order)
