"""Replays a routing trace through the same cache, policies and predictors that the runtime drives."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from cache.events import Events, trace_events
from cache.expert_cache import ExpertCache, Lookup, Reservation, SlotState
from cache.guesses import GuessWorth, guesses_of
from cache.hardware import Hardware
from cache.keys import ExpertKey
from cache.misses import MOST_ADMITTED, ExpertWork, MissPlanner, MissRates
from cache.policies import PolicyContext, is_simulation_only, make_policy
from cache.predictors import PredictorContext, layers_ahead, make_predictor
from cache.read_ahead import ReadAhead
from cache.replay_counts import (
    ADMITTED,
    DROPPED,
    EVENTS,
    EVICTIONS,
    HITS,
    MISSES,
    ON_CPU,
    PENDING,
    PREFETCHED,
    READ_AHEAD,
    USED,
    WASTED,
    ReplayCounts,
)
from cache.replay_result import Part, Prediction, Seconds
from cache.shares import even_share
from cache.timeline import Timeline
from cache.trace import Trace

__all__ = ["Part", "Prediction", "ReplayResult", "ReplaySettings", "Seconds", "replay", "replay_events"]


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """What is replayed. ``slots`` are those of the whole cache, whatever the scope.

    ``fresh_per_request`` empties the cache and forgets all history whenever the request changes; with
    ``keep_learned`` only the cache is emptied, and what policy and predictor have learned goes on. ``predictor``
    names what foretells the next event of decoded tokens (None: nothing is prefetched), and ``prefetch_limit`` the
    most experts that it may ask for, for each of them (None: what :func:`cache.guesses.guesses_of` says).
    ``record_bytes`` gives the bytes, and with ``hardware`` the seconds; without hardware a prefetch arrives before the
    next event. ``miss`` other than ``fetch`` lets the CPU compute misses of decoded tokens where they lie
    (:class:`cache.misses.MissPlanner`); it needs hardware with a link, a CPU and no disk, all records being in RAM.
    """

    policy: str = "foresight"
    slots: int = 1
    scope: str = "global"
    fresh_per_request: bool = False
    seed: int = 0
    predictor: str | None = None
    prefetch_limit: int | None = None
    record_bytes: int | None = None
    hardware: Hardware | None = None
    keep_learned: bool = False
    miss: str = "fetch"

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError("a replay needs at least one slot")
        if self.hardware is not None and self.record_bytes is None:
            raise ValueError("seconds need the size of a record")
        rates = self.hardware
        if self.miss != "fetch" and not (rates and rates.host_bytes_per_s and rates.link_bytes_per_s):
            raise ValueError(f"miss {self.miss}: needs hardware with a link and a CPU that computes")
        if self.miss != "fetch" and rates and rates.disk_bytes_per_s:
            raise ValueError(f"miss {self.miss}: needs hardware without a disk: what the CPU computes lies in RAM")


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """``cold`` are the events that met a free slot they might have used, ``steady`` all others.

    ``seconds`` are those of decoded tokens, ``prefill_seconds`` those of the rest, which count an expert's product of
    many tokens as one of few. All three last fields are None where nothing was there to measure.
    """

    settings: ReplaySettings
    layers: tuple[int, ...]
    cold: Part
    steady: Part
    seconds: Seconds | None = None
    prefill_seconds: Seconds | None = None
    prediction: Prediction | None = None

    @property
    def total(self) -> Part:
        return self.cold + self.steady

    @property
    def hit_rate(self) -> float | None:
        return self.total.hit_rate

    @property
    def bytes_read(self) -> int | None:
        return None if self.settings.record_bytes is None else self.total.loads * self.settings.record_bytes


def replay(trace: Trace, settings: ReplaySettings, training: Trace | None = None) -> ReplayResult:
    """Replay ``trace``. Policies and predictors that learn from other requests beforehand get ``training``.

    Raises PolicyError or PredictorError for a name, scope or parameter that does not exist.
    """
    return replay_events(trace_events(trace), settings, None if training is None else trace_events(training))


def replay_events(events: Events, settings: ReplaySettings, training: Events | None = None) -> ReplayResult:
    """:func:`replay`, for events that several replays share."""
    apart = settings.fresh_per_request and (is_simulation_only(settings.policy) or not settings.keep_learned)
    counts = ReplayCounts(events.layers())
    for part in _requests(events) if apart else [events]:
        _Replay(part, settings, training, counts).run()
    prefill, decode = counts.times() if settings.hardware else (None, None)
    prediction = Prediction(*counts.prediction) if settings.predictor else None
    return ReplayResult(settings, counts.layers, *counts.parts(), decode, prefill, prediction)


def _requests(events: Events) -> Iterator[Events]:
    for request in dict.fromkeys(events.request.tolist()):
        yield events.where(events.request == request)


class _Replay:
    """One replay from an empty cache."""

    def __init__(self, events: Events, settings: ReplaySettings, training: Events | None, counts: ReplayCounts) -> None:
        layers = counts.layers
        experts = max(int(part.experts.max(initial=0)) + 1 for part in (events, training) if part is not None)
        context = PolicyContext(
            settings.scope, settings.seed, layers=len(layers), experts=experts, future=events, training=training
        )
        self.events, self.settings, self.counts = events, settings, counts
        policy = make_policy(settings.policy, context)
        shared = layers if settings.scope == "layer" and layers else None
        fill, records = even_share(settings.slots, len(layers)), len(layers) * max(experts, events.layer_experts)
        self.cache = ExpertCache(settings.slots, policy, shared, fill, records)
        # what knows the future must be told of all of it, so its events do not stream
        self.recent = {} if is_simulation_only(settings.policy) else events.recent
        self.reading = ReadAhead(self.cache, dict.fromkeys(layers, events.layer_experts or experts))
        self.read_at = 0.0  # when the last of what it reads ahead arrives
        self.predictor = None
        self.worth = GuessWorth()
        self.limit = 0
        if settings.predictor is not None:
            self.predictor = make_predictor(settings.predictor, PredictorContext(layers, experts, events))
            link = settings.hardware is not None and settings.hardware.link_bytes_per_s is not None
            self.limit = settings.prefetch_limit or guesses_of(events.experts_of_a_token(), link)
            if training is not None and not self.predictor.simulation_only:
                for layer, decode, chosen in training.rows():
                    self.predictor.record_event(layer, chosen, decode=decode)
        self.timeline = None
        if settings.hardware is not None and settings.record_bytes is not None:
            self.timeline = Timeline(settings.hardware, settings.record_bytes, max(1, len(layers)))
        self.planner, self.work = _planner(settings)
        self.unused: dict[ExpertKey, None] = {}  # prefetched, and no event has asked for them yet
        self.ahead: dict[ExpertKey, None] = {}  # of these, on their way
        self.guessed: tuple[int, list[int]] | None = None

    def run(self) -> None:
        counts, cache = self.counts, self.cache
        plain = self.predictor is None and self.timeline is None
        emptied = self.settings.fresh_per_request
        last = None
        requests, tokens = self.events.request.tolist(), self.events.tokens.tolist()
        for number, (layer, decode, experts) in enumerate(self.events.rows()):
            if emptied and requests[number] != last:
                if last is not None:
                    self._empty()
                last = requests[number]
            row = (counts.cold if cache.has_free_slot(layer) else counts.steady)[layer]
            if layer == counts.layers[0]:
                self.reading.begin_pass(tokens[number] if number in self.recent else 1)
                self._read_ahead()
            if plain:
                evicted = cache.counters.evictions
                found = self._lookup(layer, experts, decode, tokens[number], self.recent.get(number))
                if found.misses or found.pending or self.reading.aims:
                    self._load(found)
                self._end_event(layer)
                row[EVICTIONS] += cache.counters.evictions - evicted
            else:
                found = self._event(row, layer, decode, experts, tokens[number], self.recent.get(number))
            row[EVENTS] += 1
            row[HITS] += len(found.hits)
            row[PENDING] += len(found.pending)
            row[MISSES] += len(found.misses)
        self._end_prefetches()

    def _event(
        self,
        row: list[int],
        layer: int,
        decode: bool,
        experts: list[int],
        tokens: int,
        recent: Sequence[Sequence[int]] | None,
    ) -> Lookup:
        """One event with everything that can happen in it; counts all but hits, pending and misses."""
        cache, timeline = self.cache, self.timeline
        began = self._clocks()
        for key in timeline.begin_event(tokens) if timeline else list(self.ahead):
            del self.ahead[key]
            cache.commit(key)
        evicted = cache.counters.evictions
        used = row[USED]
        if self.planner is not None:  # what has not begun need not be copied: the CPU can compute it
            self._drop_late(row, layer)
        found = self._lookup(layer, experts, decode, tokens, recent)
        arrival = max(self._sort_prefetches(row, layer, found), self.read_at)
        on_cpu: list[ExpertKey] = []
        if self.planner is not None:
            keys = self.cache.keys(layer, experts)
            for group in [keys] if recent is None else [self.cache.keys(layer, group) for group in recent]:
                self.planner.record_event(group)
            if decode and tokens == 1:
                on_cpu = self._on_cpu(found)
        loads = found._replace(misses=[key for key in found.misses if key not in on_cpu])
        if timeline and loads.misses:
            arrival = max(arrival, timeline.demand(len(loads.misses)))
        if self.predictor is not None:
            self._check_guesses(layer, decode, experts)
            self.worth.record_event(layer, experts, decode=decode)
            self.predictor.record_event(layer, experts, decode=decode)
        self._load(loads, (layer, tokens) if decode and self.predictor is not None else None)
        row[ON_CPU] += len(on_cpu)
        row[ADMITTED] += self._admit(on_cpu)
        self._end_event(layer)
        if timeline:
            timeline.compute(len(found.hits), len(on_cpu))
            timeline.wait(arrival)
            timeline.compute(len(found.pending) + len(loads.misses))
            self.read_at = timeline.demand(len(self.reading.coming)) if self.reading.coming else 0.0
            stall, disk, link, now = (after - before for after, before in zip(self._clocks(), began, strict=True))
            done = tokens if layer == self.counts.layers[-1] else 0
            least = (
                timeline.link_s(row[USED] - used + len(self.reading.taken) + len(loads.misses)),
                timeline.chain_s(tokens, len(found.hits), len(loads.misses), len(found.pending), len(on_cpu)),
            )
            self.counts.seconds[int(decode)] += now - stall, stall, disk, link, *least, done
        row[EVICTIONS] += cache.counters.evictions - evicted
        return found

    def _lookup(
        self, layer: int, experts: list[int], decode: bool, tokens: int, recent: Sequence[Sequence[int]] | None
    ) -> Lookup:
        found = self.reading.take(self.cache.lookup(layer, experts, decode=decode, recent=recent))
        self.reading.begin_event(layer, len(experts), tokens, recent)
        return found

    def _end_event(self, layer: int) -> None:
        for key in self.reading.left(layer):
            self._keep(key)
        self.cache.end_event()

    def _read_ahead(self) -> None:
        loads = self.reading.reserve()
        self._count_waste(loads)
        for load in loads:
            self.counts.steady[load.key.layer][READ_AHEAD] += 1

    def _keep(self, key: ExpertKey) -> None:
        self.reading.forget(key)
        self.cache.commit(key)

    def _on_cpu(self, found: Lookup) -> list[ExpertKey]:
        assert self.planner is not None
        tokens = dict.fromkeys((key.expert for part in found for key in part), 1)
        return self.planner.on_cpu(found.misses, tokens, self.work, hits=found.hits, loading=len(found.pending))

    def _admit(self, keys: Sequence[ExpertKey]) -> int:
        """Ask for some of what the CPU computes with, as the runtime does; returns how many."""
        if not keys:
            return 0
        assert self.planner is not None and self.timeline is not None
        best = self.planner.hottest_first(keys)[: max(0, MOST_ADMITTED - len(self.ahead))]
        loads = self.cache.reserve_ahead(best, partial(self.planner.repays, self.work))
        self._count_waste(loads)
        for load in loads:
            self.ahead[load.key] = None
            self.timeline.prefetch(load.key)
        return len(loads)

    def _load(self, found: Lookup, ahead: tuple[int, int] | None = None) -> None:
        """Load the misses of an event, in waves as the runtime does, and prefetch for the event after ``ahead``, a
        layer and how many tokens decode."""
        cache = self.cache
        loads = cache.reserve(found.misses) if found.misses else []
        self._count_waste(loads)
        if len(loads) == len(found.misses) and not self.reading.aims:  # all at once: nothing has to be released
            if ahead is not None:
                self._prefetch(*ahead)
            for load in loads:
                cache.commit(load.key)
            for key in found.pending:
                cache.commit(key)
            return
        waiting = found.misses[len(loads) :]
        taken = len(self.reading.taken)
        queue = deque([*found.pending[taken:], *(load.key for load in loads)])
        if not waiting:
            self._read_ahead()
        for key in found.pending[:taken]:
            cache.commit(key)
            cache.release(key)
            queue += self._next_loads(waiting)
        for hit in found.hits:
            if not waiting and not self.reading.aims:
                break
            cache.release(hit)
            queue += self._next_loads(waiting)
        while queue or waiting:
            if ahead is not None and not waiting:
                self._prefetch(*ahead)
                ahead = None
            if queue:
                key = queue.popleft()
                cache.commit(key)
                cache.release(key)
            else:
                self._give_way()
            queue += self._next_loads(waiting)

    def _give_way(self) -> None:
        """Loads that the event does not need hold the slots that are left: end one."""
        if self.ahead:
            key = next(iter(self.ahead))
            del self.ahead[key]
            if self.timeline:
                self.timeline.finish(key)
            self.cache.commit(key)
        else:
            self._keep(next(iter(self.reading.coming)))

    def _next_loads(self, waiting: list[ExpertKey]) -> list[ExpertKey]:
        loads = self.cache.reserve(waiting) if waiting else []
        self._count_waste(loads)
        del waiting[: len(loads)]
        if not waiting:
            self._read_ahead()
        return [load.key for load in loads]

    def _prefetch(self, layer: int, tokens: int) -> None:
        assert self.predictor is not None
        for steps in range(1, layers_ahead(tokens) + 1):
            after = self.predictor.layer_after(layer, steps)
            guesses = self.predictor.predict(layer, self.limit * tokens, steps)
            if steps == 1:
                self.guessed = after, guesses
            if not guesses:
                continue
            guesses = self._worthwhile(after, steps, guesses)
            loads = self.cache.reserve_ahead(self.cache.keys(after, guesses))
            self._count_waste(loads)
            for load in loads:
                self.counts.steady[after][PREFETCHED] += 1
                self.ahead[load.key] = self.unused[load.key] = None
                if self.timeline:
                    self.timeline.prefetch(load.key)
            if len(self.ahead) >= len(guesses):
                break

    def _sort_prefetches(self, row: list[int], layer: int, found: Lookup) -> float:
        """Those that this event needs become its loads; those that came too late are dropped if they have not begun."""
        arrival = 0.0
        for key in found.pending:
            if key not in self.ahead:
                continue  # read ahead, not on a guess
            del self.ahead[key]
            if self.timeline:
                arrival = max(arrival, self.timeline.finish(key))
        self._drop_late(row, layer)
        for key in (*found.hits, *found.pending):
            if key in self.unused:
                del self.unused[key]
                row[USED] += 1
        return arrival

    def _worthwhile(self, layer: int, steps: int, guesses: list[int]) -> list[int]:
        keys = self.cache.keys(layer, guesses)
        absent = {key.expert for key in keys if self.cache.state(key) is SlotState.EMPTY}
        return self.worth.choose(layer, steps, guesses, absent)

    def _drop_late(self, row: list[int], layer: int) -> None:
        for key in [key for key in self.ahead if key.layer == layer]:
            if self.timeline and self.timeline.drop(key):
                del self.ahead[key]
                self.unused.pop(key, None)
                self.cache.abandon(key)
                row[DROPPED] += 1

    def _count_waste(self, loads: Sequence[Reservation]) -> None:
        for load in loads:
            if load.victim in self.unused:
                del self.unused[load.victim]
                self.counts.steady[load.victim.layer][WASTED] += 1

    def _check_guesses(self, layer: int, decode: bool, experts: list[int]) -> None:
        if self.guessed is not None and decode and self.guessed[0] == layer:
            right = len(set(experts).intersection(self.guessed[1]))
            for at, count in enumerate((len(experts), len(self.guessed[1]), right)):
                self.counts.prediction[at] += count
        self.guessed = None

    def _empty(self) -> None:
        self._end_prefetches()
        self.cache.clear()

    def _end_prefetches(self) -> None:
        """Nobody will use those that are left: what has not begun is dropped, the rest was read for nothing."""
        for key in list(self.reading.coming):
            self._keep(key)
        for key in self.ahead:
            if self.timeline and self.timeline.drop(key):
                self.unused.pop(key, None)
                self.cache.abandon(key)
                self.counts.steady[key.layer][DROPPED] += 1
            else:
                if self.timeline:
                    self.timeline.finish(key)
                self.cache.commit(key)
        self.ahead.clear()
        for key in self.unused:
            self.counts.steady[key.layer][WASTED] += 1
        self.unused.clear()

    def _clocks(self) -> tuple[float, float, float, float]:
        lanes = self.timeline
        return (lanes.stall, lanes.disk_busy, lanes.link_busy, lanes.now) if lanes else (0.0, 0.0, 0.0, 0.0)


def _planner(settings: ReplaySettings) -> tuple[MissPlanner | None, ExpertWork]:
    work = ExpertWork(settings.record_bytes or 0, 0.0)
    rates = settings.hardware
    if settings.miss == "fetch" or rates is None or not rates.link_bytes_per_s or not rates.host_bytes_per_s:
        return None, work
    unlimited = float("inf")  # one token's arithmetic never takes as long as reading the weights
    link, device, host = rates.link_bytes_per_s, rates.expert_bytes_per_s, rates.host_bytes_per_s
    miss_rates = MissRates(link, device, unlimited, host, unlimited, rates.load_s, rates.event_s)
    return MissPlanner(miss_rates, settings.miss), work
