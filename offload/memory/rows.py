"""How many rows of a batch are in flight at once: a pure function of sizes and rates. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from offload.memory.hit_rates import expected_hit_rate

CANDIDATES = (1, 2, 4, 8, 16, 32, 64)
DISK_BYTES_PER_S = 1.5e9
MEMORY_BYTES_PER_S = 10e9
LINK_BYTES_PER_S = 12e9
DEVICE_BYTES_PER_S = 250e9
"""Rates of a machine that was not measured, and of a card. Only what they are to each other decides."""
_NEXT_ROW = 0.25
"""What a further row's arithmetic costs, as a share of the first one's, which waits for the memory."""
_LAYER_S = 0.8e-3
"""What a layer takes beside its weights in any pass: the Python of model and cache, norms, the router."""
_GOOD_ENOUGH = 0.95
"""The fewest rows that reach this share of the best rate are chosen: more take memory and let each row wait longer."""


@dataclass(frozen=True, slots=True)
class RowMemory:
    """What the KV cache of one row takes: ``fixed`` bytes (sliding windows) and ``per_token`` bytes.

    ``unpacked``: bytes a token that a pass needs beside it for one layer, where less is kept than attention takes.
    """

    fixed: int
    per_token: int
    unpacked: int = 0

    def bytes(self, tokens: int) -> int:
        return self.fixed + self.per_token * tokens


@dataclass(frozen=True, slots=True)
class GainCurve:
    """What more rows in a decode pass bring. Sizes in bytes, rates in bytes a second.

    Each of ``layers`` has ``experts`` experts of ``record_bytes``, of which a token takes ``top_k``.
    """

    layers: int
    experts: float
    top_k: int
    record_bytes: int
    skeleton_bytes: int
    disk: float = DISK_BYTES_PER_S
    memory: float = MEMORY_BYTES_PER_S

    def distinct(self, rows: int) -> float:
        """Experts of a layer that ``rows`` tokens take together, if all are as likely: real routers take fewer."""
        return self.experts * (1 - (1 - min(1.0, self.top_k / self.experts)) ** rows)

    def hit_rate(self, rows: int, slots: int) -> float:
        """The share of the needed records that are found in ``slots``.

        One row finds its favourites, which are resident for it. Others have favourites of their own; rows that need
        all experts find no more than have slots. Between these it follows how many they need.
        """
        residency = min(1.0, slots / (self.layers * self.experts))
        alone = expected_hit_rate(residency)
        others = self.experts - self.distinct(1)
        spread = (self.distinct(rows) - self.distinct(1)) / others if others > 0 else 1.0
        return alone - spread * max(0.0, alone - residency)

    def tokens_per_s(self, rows: int, slots: int) -> float:
        """Expected rate of decoding with ``slots``. Experts are computed while others are read, all else is not."""
        needed, missing = self.distinct(rows), 1 - self.hit_rate(rows, slots)
        first_reads = 1 - (1 - missing) ** needed  # nothing else is read beside the first of an event
        disk = (needed * missing + first_reads) * self.record_bytes / self.disk
        more = _NEXT_ROW * (rows - 1)
        experts = (needed + more * self.top_k) * self.record_bytes / self.memory
        dense = self.skeleton_bytes * (1 + more) / self.memory
        return rows / (dense + self.layers * (max(disk, experts) + _LAYER_S))

    def choose(self, slots: Mapping[int, int]) -> int:
        """The number of rows to run at once, of those in ``slots``, which tells what each leaves for experts."""
        rates = {rows: self.tokens_per_s(rows, left) for rows, left in slots.items()}
        best = max(rates.values())
        return min(rows for rows, rate in rates.items() if rate >= _GOOD_ENOUGH * best)
