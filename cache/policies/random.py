"""Random replacement: the baseline that a policy must beat."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from cache.keys import ExpertKey
from cache.policies.base import Policy, PolicyContext

_TRIES = 16
_MASK = 2**64 - 1


class Random(Policy):
    """Gives up any record, each as likely. Draws from the seed and the number of evictions: asking changes nothing."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._evictions = 0
        self._keys: list[ExpertKey] = []
        self._index: dict[ExpertKey, int] = {}

    @classmethod
    def create(cls, context: PolicyContext, **values: Any) -> Random:
        layer = 0 if context.layer is None else context.layer + 1
        return cls(mix(context.seed + (layer << 32)), **values)

    def record_event(self, keys: Sequence[ExpertKey]) -> None:
        pass

    def admit(self, key: ExpertKey) -> None:
        self._index[key] = len(self._keys)
        self._keys.append(key)

    def evict(self, key: ExpertKey) -> None:
        self._evictions += 1
        at, last = self._index.pop(key), self._keys.pop()
        if last != key:
            self._keys[at] = last
            self._index[last] = at

    def victims(self, n: int, protected: Collection[ExpertKey], layer: int | None = None) -> list[ExpertKey] | None:
        chosen: dict[ExpertKey, None] = {}
        if n <= 0:
            return []
        for draw in range(_TRIES * n):
            key = (
                self._keys[mix(self._seed ^ mix((self._evictions << 16) + draw)) % len(self._keys)]
                if self._keys
                else None
            )
            if key is not None and key not in protected and (layer is None or key.layer == layer):
                chosen[key] = None
            if len(chosen) == n:
                return list(chosen)
        for key in self._keys:  # nearly all are protected: take what there is
            if len(chosen) == n:
                break
            if key not in protected and (layer is None or key.layer == layer):
                chosen[key] = None
        return list(chosen) if len(chosen) >= n else None

    def resident(self) -> set[ExpertKey]:
        return set(self._keys)

    def check_integrity(self) -> None:
        assert self._index == {key: at for at, key in enumerate(self._keys)}, "every key knows its place"


def mix(number: int) -> int:
    """64 well mixed bits of ``number``. Source: Steele et al., SplitMix64 (OOPSLA 2014)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)
