"""The least time that a part of a run can take: its reads at the disk's rate, its arithmetic at the kernels'.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Work:
    """What one forward pass has to do. ``skeleton_bytes`` are multiplied in every pass, ``record_bytes`` for every
    expert that it takes; ``token_flops`` are a token's operations, by the bits of the weights: 4, 8, or 0 for those
    that the library multiplies.
    """

    skeleton_bytes: int
    record_bytes: int
    token_flops: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Rates:
    """Of a machine: bytes a second from disk, bytes of weights a second with one token, and with many tokens operations
    a second, by the bits of the weights as in :class:`Work`.
    """

    disk: float
    weights: float
    flops: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds that no run can beat: reading and computing can overlap, so it is the larger of both."""

    disk: float
    compute: float

    @property
    def seconds(self) -> float:
        return max(self.disk, self.compute)


def bound(work: Work, rates: Rates, *, needed_bytes: int, passes: int, accesses: int, tokens: int) -> Bound:
    """Of ``passes`` forward passes over ``tokens`` tokens together, that took ``accesses`` distinct experts in all
    their events and needed ``needed_bytes`` of records that were not held.
    """
    streamed = (passes * work.skeleton_bytes + accesses * work.record_bytes) / rates.weights
    multiplied = tokens * sum(flops / rates.flops[bits] for bits, flops in work.token_flops.items())
    return Bound(needed_bytes / rates.disk, max(streamed, multiplied))
