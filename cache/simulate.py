"""Replays a routing trace through the same cache and policies that the runtime drives."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cache.events import Events, trace_events
from cache.expert_cache import ExpertCache
from cache.hardware import Hardware
from cache.keys import ExpertKey
from cache.policies import PolicyContext, make_policy
from cache.trace import Trace


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """What is replayed. ``slots`` are those of the whole cache, whatever the scope.

    ``fresh_per_request`` empties the cache and forgets all history whenever the request changes. ``predictor`` names what
    foretells the next event (None: nothing is prefetched), and ``prefetch_limit`` the most experts that it may ask for
    (None: half of the model's top-k). ``record_bytes`` gives the bytes, and with ``hardware`` the seconds.
    """

    policy: str = "ewma"
    slots: int = 1
    scope: str = "layer"
    fresh_per_request: bool = False
    seed: int = 0
    predictor: str | None = None
    prefetch_limit: int | None = None
    record_bytes: int | None = None
    hardware: Hardware | None = None

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError("a replay needs at least one slot")
        if self.hardware is not None and self.record_bytes is None:
            raise ValueError("seconds need the size of a record")


Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Part:
    """Counts of one part of a replay, [L] each: by layer, in the order of :attr:`ReplayResult.layers`.

    ``wasted`` are prefetched records that were evicted, or left over at the end, before any event used them.
    """

    events: Counts
    hits: Counts
    pending: Counts
    misses: Counts
    evictions: Counts
    prefetched: Counts
    used: Counts
    wasted: Counts

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
        return np.divide(self.hits, accesses, out=np.full(len(accesses), np.nan), where=accesses > 0)

    @property
    def loads(self) -> int:
        """Records that were read: every miss and every prefetch."""
        return int(self.misses.sum() + self.prefetched.sum())

    def __add__(self, other: Part) -> Part:
        return Part(**{name: getattr(self, name) + getattr(other, name) for name in Part.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class Seconds:
    """Time by lane. ``total`` is that of the compute lane: ``compute`` and ``stall``; disk and link run beside it."""

    compute: float
    stall: float
    disk: float
    link: float
    tokens: int

    @property
    def total(self) -> float:
        return self.compute + self.stall

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.total if self.total else None


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """``cold`` are the events that met a free slot they might have used, ``steady`` all others."""

    settings: ReplaySettings
    layers: tuple[int, ...]
    cold: Part
    steady: Part
    seconds: Seconds | None = None

    @property
    def total(self) -> Part:
        return self.cold + self.steady

    @property
    def hit_rate(self) -> float | None:
        return self.total.hit_rate

    @property
    def bytes_read(self) -> int | None:
        return None if self.settings.record_bytes is None else self.total.loads * self.settings.record_bytes


_COLUMNS = tuple(Part.__dataclass_fields__)


@dataclass(slots=True)
class _Tally:
    """Rows of counts [L, columns] while a replay runs: lists, which are faster than arrays one element at a time."""

    layers: Sequence[int]
    cold: list[list[int]] = field(default_factory=list)
    steady: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cold = [[0] * len(_COLUMNS) for _ in self.layers]
        self.steady = [[0] * len(_COLUMNS) for _ in self.layers]


def replay(trace: Trace, settings: ReplaySettings, training: Trace | None = None) -> ReplayResult:
    """Replay ``trace``. Policies and predictors that learn from other requests beforehand get ``training``.

    Raises PolicyError for a policy or scope that does not exist.
    """
    return replay_events(trace_events(trace), settings, None if training is None else trace_events(training))


def replay_events(events: Events, settings: ReplaySettings, training: Events | None = None) -> ReplayResult:
    """:func:`replay`, for events that several replays share."""
    layers = events.layers()
    tally = _Tally(layers)
    make_policy(settings.policy, PolicyContext(settings.scope, settings.seed, None, events, training))
    if layers:
        for part in _requests(events) if settings.fresh_per_request else [events]:
            _replay_part(part, settings, training, layers, tally)
    cold, steady = (
        Part(*np.array(rows, dtype=np.int64).reshape(len(layers), len(_COLUMNS)).T.copy())
        for rows in (tally.cold, tally.steady)
    )
    return ReplayResult(settings, tuple(layers), cold, steady)


def _requests(events: Events) -> list[Events]:
    return [events.where(events.request == request) for request in dict.fromkeys(events.request.tolist())]


def _replay_part(
    events: Events, settings: ReplaySettings, training: Events | None, layers: Sequence[int], tally: _Tally
) -> None:
    """Replay ``events`` from an empty cache."""
    policy = make_policy(settings.policy, PolicyContext(settings.scope, settings.seed, None, events, training))
    cache = ExpertCache(settings.slots, policy, layers if settings.scope == "layer" else None)
    index = {layer: number for number, layer in enumerate(layers)}
    for layer, decode, experts in zip(events.layer.tolist(), events.decode.tolist(), events.sets(), strict=True):
        rows = tally.cold if cache.has_free_slot(layer) else tally.steady
        row = rows[index[layer]]
        hits, pending, misses, evictions = serve(cache, layer, experts, decode)
        row[0] += 1
        row[1] += hits
        row[2] += pending
        row[3] += misses
        row[4] += evictions


def serve(cache: ExpertCache, layer: int, experts: Sequence[int], decode: bool) -> tuple[int, int, int, int]:
    """One event, in waves as the runtime does it. Returns (hits, pending, misses, evictions)."""
    before = cache.counters.evictions
    found = cache.lookup(layer, experts, decode=decode)
    counts = len(found.hits), len(found.pending), len(found.misses)
    misses = found.misses
    if misses:
        loads = cache.reserve(misses)
        if len(loads) == len(misses):  # all at once: nothing has to be released
            for load in loads:
                cache.commit(load.key)
        else:
            _serve_in_waves(cache, found.hits, misses, [load.key for load in loads])
    cache.end_event()
    return *counts, cache.counters.evictions - before


def _serve_in_waves(
    cache: ExpertCache, hits: Sequence[ExpertKey], misses: Sequence[ExpertKey], loading: Sequence[ExpertKey]
) -> None:
    """What the runtime does with an event that is larger than its slots: one release at a time frees one slot."""
    waiting = list(misses[len(loading) :])
    queue = deque(loading)
    for hit in hits:
        if not waiting:
            break
        cache.release(hit)
        queue += _next_loads(cache, waiting)
    while queue:
        key = queue.popleft()
        cache.commit(key)
        cache.release(key)
        if waiting:
            queue += _next_loads(cache, waiting)
    assert not waiting, "one slot is enough for any event"


def _next_loads(cache: ExpertCache, waiting: list[ExpertKey]) -> list[ExpertKey]:
    loads = [load.key for load in cache.reserve(waiting)]
    del waiting[: len(loads)]
    return loads
