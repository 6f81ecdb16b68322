"""What a replay counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Part:
    """Counts of one part of a replay, [L] each: by layer, in the order of :attr:`cache.simulate.ReplayResult.layers`.

    ``prefetched`` records were asked for ahead, ``dropped`` ones of them given up before they were read. ``used`` are
    those that an event found ready or on their way, ``wasted`` those that were read and evicted, or left over, before
    that. ``on_cpu`` of the misses were computed where they lay, and ``admitted`` of these were copied all the same.
    ``read_ahead`` records were read by passes of many tokens before their event (:mod:`cache.read_ahead`).
    """

    events: Counts
    hits: Counts
    pending: Counts
    misses: Counts
    evictions: Counts
    prefetched: Counts
    dropped: Counts
    used: Counts
    wasted: Counts
    on_cpu: Counts
    admitted: Counts
    read_ahead: Counts

    @property
    def accesses(self) -> int:
        return int((self.hits + self.pending + self.misses).sum())

    @property
    def hit_rate(self) -> float | None:
        """Share of accesses that were hits (a pending is not one); None without accesses."""
        return int(self.hits.sum()) / self.accesses if self.accesses else None

    @property
    def hit_rates(self) -> NDArray[np.float64]:
        """:attr:`hit_rate` by layer, [L]; NaN without accesses."""
        accesses = self.hits + self.pending + self.misses
        rates = np.full(len(accesses), np.nan)
        np.divide(self.hits, accesses, out=rates, where=accesses > 0)
        return rates

    @property
    def loads(self) -> int:
        """Records that were read: misses, prefetches and what was read ahead, without those that were dropped or
        computed where they lay."""
        asked = self.misses + self.prefetched + self.read_ahead
        return int((asked - self.on_cpu + self.admitted - self.dropped).sum())

    def __add__(self, other: Part) -> Part:
        return Part(**{name: getattr(self, name) + getattr(other, name) for name in PART_COLUMNS})


PART_COLUMNS = tuple(Part.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Seconds:
    """Time by lane. :attr:`total` is that of the compute lane: computing and stalls; disk and link run beside it.

    ``needed_link`` is the link's time for records that events asked for, without prefetches in vain. ``chain`` is the
    least time that the order of things allows: a copy that nobody foretold begins when the router has spoken.
    """

    compute: float
    stall: float
    disk: float
    link: float
    needed_link: float
    chain: float
    tokens: int

    @property
    def total(self) -> float:
        return self.compute + self.stall

    @property
    def least(self) -> float:
        """The time that lanes and order allow for these hits and these guesses: nobody could be faster."""
        return max(self.compute, self.needed_link, self.chain)

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.total if self.total else None


@dataclass(frozen=True, slots=True)
class Prediction:
    """How good the guesses were that a prefetch asked for: of the events that were foretold, the experts ``wanted``."""

    wanted: int
    guessed: int
    right: int

    @property
    def recall(self) -> float | None:
        return self.right / self.wanted if self.wanted else None

    @property
    def precision(self) -> float | None:
        return self.right / self.guessed if self.guessed else None
