"""What an expert cache answers and counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from cache.keys import ExpertKey


class SlotState(Enum):
    EMPTY = "empty"
    LOADING = "loading"
    READY = "ready"


class Lookup(NamedTuple):
    """One event, classified as a whole before anything is admitted. Each part is in the order of the request."""

    hits: list[ExpertKey]
    pending: list[ExpertKey]
    misses: list[ExpertKey]


class Reservation(NamedTuple):
    """``key`` shall be loaded into ``slot``; ``victim`` was there before and is gone."""

    key: ExpertKey
    slot: int
    victim: ExpertKey | None


@dataclass(slots=True)
class Counters:
    """Accesses by outcome; one access is one distinct expert of one event."""

    hits: int = 0
    pending: int = 0
    misses: int = 0

    @property
    def accesses(self) -> int:
        return self.hits + self.pending + self.misses

    @property
    def hit_rate(self) -> float | None:
        """Share of accesses that were hits (a pending is not one), or None before the first access."""
        return self.hits / self.accesses if self.accesses else None


@dataclass(slots=True)
class CacheCounters:
    prefill: Counters = field(default_factory=Counters)
    decode: Counters = field(default_factory=Counters)
    evictions: int = 0
    failed_loads: int = 0
