"""Least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from cache.keys import ExpertKey
from cache.policies.base import Policy


class LRU(Policy):
    """Gives up the record whose last event is the longest ago; of those used by the same event, the first admitted."""

    name = "lru"

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertKey, int] = OrderedDict()  # least recently used first -> admission's number
        self._admissions = 0

    def record_event(self, keys: Sequence[ExpertKey]) -> None:
        order = self._order
        for _, key in sorted([(order[key], key) for key in keys if key in order]):
            order.move_to_end(key)

    def admit(self, key: ExpertKey) -> None:
        self._admissions += 1
        self._order[key] = self._admissions

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
