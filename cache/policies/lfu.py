"""Least frequently used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cache.keys import ExpertKey
from cache.policies.scored import ScoredPolicy


class LFU(ScoredPolicy):
    """Gives up the record with the fewest events so far, the least recent of equals first."""

    name = "lfu"
    growing = True

    def __init__(self) -> None:
        super().__init__()
        self._uses: Counter[ExpertKey] = Counter()

    def score(self, key: ExpertKey) -> float:
        return float(self._uses[key])

    def update_scores(self, keys: Sequence[ExpertKey]) -> None:
        self._uses.update(keys)
