"""The name of an expert."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple


class ExpertKey(NamedTuple):
    """Routed expert ``expert`` of MoE layer ``layer`` (the decoder layer's number, not a count of MoE layers)."""

    layer: int
    expert: int


class KeyTable:
    """Keys by layer and expert: the same objects every time, since making them takes time."""

    def __init__(self) -> None:
        self._known: defaultdict[int, list[ExpertKey]] = defaultdict(list)

    def of(self, layer: int, experts: Iterable[int]) -> list[ExpertKey]:
        """The keys of ``experts`` of ``layer``."""
        known = self._known[layer]
        try:
            return [known[expert] for expert in experts]
        except IndexError:
            experts = list(experts)
            known += [ExpertKey(layer, expert) for expert in range(len(known), max(experts) + 1)]
            return [known[expert] for expert in experts]
