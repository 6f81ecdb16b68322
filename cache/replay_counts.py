"""What a replay counts while it runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cache.replay_result import PART_COLUMNS, Part, Seconds

(
    EVENTS, HITS, PENDING, MISSES, EVICTIONS, PREFETCHED, DROPPED, USED, WASTED, ON_CPU, ADMITTED,
    READ_AHEAD,
) = range(len(PART_COLUMNS))  # fmt: skip


class ReplayCounts:
    """Sums over the parts of a replay. Rows of lists: one element at a time they are faster than arrays."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self.cold, self.steady = ({layer: [0] * len(PART_COLUMNS) for layer in layers} for _ in range(2))
        self.prediction = [0, 0, 0]
        self.seconds = np.zeros((2, 7))  # prefill and decode: the fields of Seconds

    def parts(self) -> tuple[Part, Part]:
        """Of the cold events and of the steady ones."""
        tables = (np.array(list(rows.values()), np.int64) for rows in (self.cold, self.steady))
        cold, steady = (table.reshape(len(self.layers), len(PART_COLUMNS)).T.copy() for table in tables)
        return Part(*cold), Part(*steady)

    def times(self) -> tuple[Seconds, Seconds]:
        """Of prefill and of decoding."""
        prefill, decode = map(_seconds, self.seconds.tolist())
        return prefill, decode


def _seconds(row: list[float]) -> Seconds:
    compute, stall, disk, link, needed_link, chain, tokens = row
    return Seconds(compute, stall, disk, link, needed_link, chain, int(tokens))
