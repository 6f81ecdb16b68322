"""The scope ``layer`` of a policy that knows nothing of scopes: one of them for each layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from cache.keys import ExpertKey
from cache.policies.base import Policy


class PerLayer(Policy):
    """Hands every call on to the policy of the layer, made by ``make(layer)`` when the layer is first seen."""

    def __init__(self, name: str, make: Callable[[int], Policy]) -> None:
        self.name = name  # type: ignore[misc]  # that of the policies inside
        self._make = make
        self._of: dict[int, Policy] = {}

    def record_event(self, keys: Sequence[ExpertKey]) -> None:
        if keys:
            self.policy(keys[0].layer).record_event(keys)

    def admit(self, key: ExpertKey) -> None:
        self.policy(key.layer).admit(key)

    def evict(self, key: ExpertKey) -> None:
        self._of[key.layer].evict(key)

    def victims(self, n: int, protected: Collection[ExpertKey], layer: int | None = None) -> list[ExpertKey] | None:
        """As in the contract; without ``layer`` one key at a time of the layer that has most left, the lowest first."""
        if layer is not None:
            policy = self._of.get(layer)
            return policy.victims(n, protected) if policy else ([] if n <= 0 else None)
        left = {number: policy.cold(len(policy.resident()), protected) for number, policy in sorted(self._of.items())}
        chosen: list[ExpertKey] = []
        while len(chosen) < n:
            number = max(left, key=lambda number: len(left[number]), default=None)
            if number is None or not left[number]:
                return None
            chosen.append(left[number].pop(0))
        return chosen

    def resident(self) -> set[ExpertKey]:
        return {key for policy in self._of.values() for key in policy.resident()}

    def score_now(self, key: ExpertKey) -> float | None:
        policy = self._of.get(key.layer)
        return None if policy is None else policy.score_now(key)

    def check_integrity(self) -> None:
        for layer, policy in self._of.items():
            policy.check_integrity()
            assert all(key.layer == layer for key in policy.resident()), "a layer's policy has that layer's keys"

    def policy(self, layer: int) -> Policy:
        """The policy of ``layer``."""
        found = self._of.get(layer)
        if found is None:
            found = self._of[layer] = self._make(layer)
        return found
