"""The optimum, for comparison: gives up what is needed furthest in the future."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.events import Events
from cache.keys import ExpertKey
from cache.policies.base import PolicyContext
from cache.policies.scored import ScoredPolicy


class Belady(ScoredPolicy):
    """Fewest misses of all policies that admit what they fetch, as long as events fit into the slots.

    It counts the events of ``future`` that it is told of, so it must be told of all of them in their order. A record
    that is never used again goes first, the oldest of several.

    Source: Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.
    """

    name = "belady"
    simulation_only = True

    def __init__(self, future: Events) -> None:
        super().__init__()
        self._next: list[float] = next_uses(future).tolist()
        self._experts: list[int] = future.experts.tolist()
        self._access = 0  # the first one of the next event
        self._next_use: dict[ExpertKey, float] = {}

    @classmethod
    def create(cls, context: PolicyContext, **values: Any) -> Belady:
        assert context.future is not None
        future = context.future
        if context.layer is not None:
            future = future.where(future.layer == context.layer)
        return cls(future, **values)

    def score(self, key: ExpertKey) -> float:
        return -self._next_use.get(key, math.inf)

    def update_scores(self, keys: Sequence[ExpertKey]) -> None:
        start, end = self._access, self._access + len(keys)
        assert self._experts[start:end] == [key.expert for key in keys], "these are the events that it was made for"
        self._next_use.update(zip(keys, self._next[start:end], strict=True))
        self._access = end


def next_uses(events: Events) -> NDArray[np.float64]:
    """For each access [A] the number of the event that uses the same expert of the layer next, or infinity."""
    key = events.layer[events.event_of_access()].astype(np.int64) * (int(events.experts.max(initial=0)) + 1)
    key += events.experts
    event = events.event_of_access()
    order = np.lexsort((event, key))
    following = np.full(len(key), np.inf)
    same = key[order][1:] == key[order][:-1]
    following[order[:-1][same]] = event[order][1:][same]
    return following
