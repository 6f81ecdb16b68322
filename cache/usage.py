"""Who was used when: a history of every expert for people to look at. Decides nothing."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

from cache.expert_cache import Lookup


class ExpertUsage:
    """Counts of each expert's hits and misses, and the forward passes of its last use and last miss (-1: never).

    Written on the engine thread, one call an event. Other threads may copy rows: ``row[:]`` is one step.
    """

    def __init__(self, experts: Mapping[int, int]) -> None:
        """``experts``: how many each MoE layer has, by its number."""
        self.layers = tuple(sorted(experts))
        self.forward = -1
        size = [experts[layer] for layer in self.layers]
        self.hits, self.misses = ([array("q", bytes(8 * n)) for n in size] for _ in range(2))
        self.last_use, self.last_miss = ([array("q", [-1]) * n for n in size] for _ in range(2))
        rows = zip(self.hits, self.misses, self.last_use, self.last_miss, strict=True)
        self._rows = dict(zip(self.layers, rows, strict=True))

    def record(self, layer: int, found: Lookup, forward: int) -> None:
        """One event of forward pass ``forward``. A pending is a use, and neither hit nor miss."""
        hits, misses, last_use, last_miss = self._rows[layer]
        for _, expert in found.hits:
            hits[expert] += 1
            last_use[expert] = forward
        for _, expert in found.misses:
            misses[expert] += 1
            last_use[expert] = last_miss[expert] = forward
        for _, expert in found.pending:
            last_use[expert] = forward
        self.forward = forward
