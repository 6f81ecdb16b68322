"""Least-Stale: what the current forward pass has touched stays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from itertools import chain

from cache.keys import ExpertKey
from cache.policies.base import Policy


class LeastStale(Policy):
    """LRU among what earlier forward passes touched; then what this pass has used; last what it has only prefetched.

    So a prefetched record is not evicted before the pass comes to it, which LRU does. Without prefetches it is LRU. A
    pass begins with an event whose layer is not above the one before.

    Source: Hoang et al., "SpecMD: a comprehensive study on speculative expert prefetching", 2026 (after its
    description: the order within the current pass is ours).
    """

    name = "least-stale"

    def __init__(self) -> None:
        self._stale: OrderedDict[ExpertKey, int] = OrderedDict()  # longest untouched first -> admission's number
        self._used: OrderedDict[ExpertKey, int] = OrderedDict()
        self._ahead: OrderedDict[ExpertKey, int] = OrderedDict()
        self._event: frozenset[ExpertKey] = frozenset()
        self._layer = -1
        self._admissions = 0

    def record_event(self, keys: Sequence[ExpertKey]) -> None:
        if keys:
            if keys[0].layer <= self._layer:
                self._stale.update(self._ahead)
                self._stale.update(self._used)
                self._ahead.clear()
                self._used.clear()
            self._layer = keys[0].layer
        self._event = frozenset(keys)
        used = [(queue.pop(key), key) for key in keys for queue in self._queues() if key in queue]
        for admission, key in sorted(used):  # of one event: as LRU does
            self._used[key] = admission

    def admit(self, key: ExpertKey) -> None:
        self._admissions += 1
        (self._used if key in self._event else self._ahead)[key] = self._admissions

    def evict(self, key: ExpertKey) -> None:
        next(queue for queue in self._queues() if key in queue).pop(key)

    def victims(self, n: int, protected: Collection[ExpertKey], layer: int | None = None) -> list[ExpertKey] | None:
        chosen: list[ExpertKey] = []
        if n <= 0:
            return chosen
        for key in chain(*self._queues()):
            if key not in protected and (layer is None or key.layer == layer):
                chosen.append(key)
                if len(chosen) == n:
                    return chosen
        return None

    def resident(self) -> set[ExpertKey]:
        return set(chain(*self._queues()))

    def check_integrity(self) -> None:
        assert sum(map(len, self._queues())) == len(self.resident()), "a record is in one queue"

    def _queues(self) -> tuple[OrderedDict[ExpertKey, int], ...]:
        return self._stale, self._used, self._ahead
