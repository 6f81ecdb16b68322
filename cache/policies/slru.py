"""Segmented LRU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from itertools import chain

from cache.keys import ExpertKey
from cache.policies.base import Policy, PolicyError


class SLRU(Policy):
    """Two LRU lists: new records are on probation, a second use protects them; victims come from probation first.

    At most ``protected`` of the residents are protected; the least recent beyond that go back on probation.

    Source: Karedla et al., "Caching strategies to improve disk system performance", IEEE Computer 27(3), 1994.
    """

    name = "slru"

    def __init__(self, *, protected: float = 0.8) -> None:
        if not 0 < protected < 1:
            raise PolicyError(f"slru: protected must be between 0 and 1, not {protected}")
        self._share = protected
        self._probation: OrderedDict[ExpertKey, None] = OrderedDict()  # least recently used first
        self._protected: OrderedDict[ExpertKey, None] = OrderedDict()

    def record_event(self, keys: Sequence[ExpertKey]) -> None:
        for key in keys:
            if key in self._protected:
                self._protected.move_to_end(key)
            elif key in self._probation:
                del self._probation[key]
                self._protected[key] = None
        most = int(self._share * (len(self._protected) + len(self._probation)))
        while len(self._protected) > most:
            key, _ = self._protected.popitem(last=False)
            self._probation[key] = None

    def admit(self, key: ExpertKey) -> None:
        self._probation[key] = None

    def evict(self, key: ExpertKey) -> None:
        del (self._probation if key in self._probation else self._protected)[key]

    def victims(self, n: int, protected: Collection[ExpertKey], layer: int | None = None) -> list[ExpertKey] | None:
        chosen: list[ExpertKey] = []
        if n <= 0:
            return chosen
        for key in chain(self._probation, self._protected):
            if key not in protected and (layer is None or key.layer == layer):
                chosen.append(key)
                if len(chosen) == n:
                    return chosen
        return None

    def resident(self) -> set[ExpertKey]:
        return {*self._probation, *self._protected}

    def check_integrity(self) -> None:
        assert not self._probation.keys() & self._protected.keys(), "a record is in one list"
