"""The experts function: runs one event of routed experts out of the expert cache."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from cache.events import by_rank
from cache.expert_cache import ExpertCache, Lookup, SlotState
from cache.guesses import guesses_of
from cache.keys import ExpertKey
from cache.misses import MOST_ADMITTED
from cache.outcomes import Reservation
from cache.read_ahead import ReadAhead
from cache.trace import TraceRecorder
from cache.usage import ExpertUsage
from offload.checkpoint.expert_file import ExpertFile
from offload.checkpoint.formats import WeightFormat, Weights
from offload.compute.base import EventCompute, ExpertCompute
from offload.devices import SlotArena
from offload.errors import Cancelled
from offload.memory.loads import Loads, LoadTicket
from offload.model.forward_pass import ForwardPass, TransferCounters
from offload.model.host_experts import HostEvent, HostExperts
from offload.model.prefetch import Guess, Prefetcher, RowGuesses
from offload.model.transformers_api import ExpertsModule, register_experts_function

_WAVE = 4
"""Records that are computed together while others wait for slots: few, so that reads start early and go on."""


class ExpertRuntime:
    """Owns the way from a routing decision to the sum of the experts' products. Runs on the engine thread only."""

    def __init__(
        self,
        cache: ExpertCache,
        arena: SlotArena,
        loads: Loads,
        file: ExpertFile,
        weight_format: WeightFormat,
        compute: ExpertCompute,
        recorder: TraceRecorder | None = None,
        predictor: Prefetcher | None = None,
        usage: ExpertUsage | None = None,
        host_experts: HostExperts | None = None,
        prefetch_bytes: int = 2**63,
        row_guesses: RowGuesses | None = None,
    ) -> None:
        """``prefetch_bytes``: the most that a pass loads on predictions for each of its rows, of whatever lane.
        ``row_guesses`` tell what can be read ahead for rows where ``predictor`` foretells nothing.

        ``instead``, if somebody set it, is called by the model in the place of :meth:`run`.
        """
        self.cache = cache
        self.usage = usage
        self.current = ForwardPass()
        self.transfers = TransferCounters()
        self.cancelled = threading.Event()
        self._arena = arena
        self.loads = loads
        self._tell_event = loads.event if loads.keeps_order else None
        self._tell_computed = loads.computed if loads.keeps_order else None
        self._file = file
        self._format = weight_format
        self._compute = compute
        self.recorder = recorder
        self.predictor = predictor
        self.host_experts = host_experts
        self.instead: Callable[..., torch.Tensor] | None = None
        self._most_ahead = prefetch_bytes
        self._left_ahead = prefetch_bytes  # bytes that the current pass may still prefetch
        self._fills_gaps = loads.link is None  # a device with a link computes beside it anyway
        self._spare: list[ExpertKey] = []  # hits of the open event to compute while nothing has arrived
        self._ahead: dict[ExpertKey, LoadTicket] = {}  # prefetches under way
        self._reading = ReadAhead(cache, {layer.layer: layer.experts for layer in file.manifest.layers})
        self._coming: dict[ExpertKey, LoadTicket] = {}  # what it reads ahead
        self._row_guesses = row_guesses
        self._unused: set[ExpertKey] = set()  # prefetched, and no event has asked for them yet
        self._tickets: dict[ExpertKey, LoadTicket] = {}
        self._pass: ForwardPass | None = None  # the one that the last event belonged to
        self._held: set[ExpertKey] = set()  # when it began
        self._views: dict[tuple[int, int], Weights] = {}  # (slot, record layout) -> weights

    def attach(self, modules: list[ExpertsModule]) -> None:
        """Serve these experts modules. Changes the modules: each remembers this runtime and its layer."""
        register_experts_function(_experts_function)
        for found in modules:
            found.module.__dict__["run_local"] = (self, found.layer)

    def run(
        self, module: Any, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """One event. ``hidden`` is [T, H], ``top_k_index`` and ``top_k_weights`` are [T, k]; returns [T, H].

        Ids at or beyond the number of experts mean "no expert". Raises Cancelled, or the error of a failed load; the
        cache is consistent afterwards, and loads that had started are finished.
        """
        if self.cancelled.is_set():
            raise Cancelled
        if self.recorder is not None:
            self.current.record(self.recorder, layer, top_k_index, top_k_weights)
        self._take_arrivals()
        chosen = top_k_index.tolist()
        experts = by_rank(chosen, module.num_experts)  # as a replay of the trace will have them
        recent = None
        if len(chosen) > 1:
            groups = ([chosen[token] for token in group] for group in self.current.recent)
            recent = [by_rank(group, module.num_experts) for group in groups]
        self.begin_pass(len(chosen))
        if self.host_experts is not None:  # what has not begun need not be copied: the CPU can compute it
            self._drop_late(layer)
        found = self._reading.take(self.cache.lookup(layer, experts, decode=self.current.decode, recent=recent))
        self._reading.begin_event(layer, len(experts), len(chosen), recent)
        event_keys = [*found.hits, *found.pending, *found.misses]
        absent = sum(ExpertKey(layer, expert) not in self._held for expert in experts)
        if absent:
            self.transfers.needed_bytes += absent * self._file.layout(layer).record_bytes
        if self.usage is not None:
            self.usage.record(layer, found, self.current.forward)
        self._sort_prefetches(layer, found)
        if self._tell_event is not None:
            self._tell_event(event_keys, [*found.pending, *found.misses])
        if self.predictor is not None:
            self.predictor.record_event(layer, experts, decode=self.current.decode)
        if self.host_experts is not None:
            for keys in [event_keys] if recent is None else [self.cache.keys(layer, group) for group in recent]:
                self.host_experts.planner.record_event(keys)
        misses = list(found.misses)
        loading = [*found.pending]
        fills = self._fills_gaps and recent is not None
        hits = [key for key in found.hits if not fills or self.cache.makes_room(key)]
        self._spare = [key for key in found.hits if key not in hits]
        on_cpu, rows = None, self.current.decode and recent is not None
        try:
            if self.host_experts is not None and misses:
                on_cpu = self.host_experts.begin(layer, hidden, chosen, found)
                if on_cpu is not None:  # the CPU would rather compute with what is read ahead
                    misses = [key for key in misses if key not in on_cpu.keys]
                    self._reading.stop()
            loading += self._start_loads(misses)  # before anything else, so that both happen at once
            if not misses:
                self._read_ahead()
            event = self._compute.begin(module, hidden, top_k_index, top_k_weights, self._weights)
            if self._row_guesses is not None:
                self._row_guesses.record_event(layer, chosen if rows else None)
                if rows and on_cpu is None and (self.predictor is None or self.predictor.rests):
                    self._row_guesses.expect(self._reading, layer, hidden, top_k_index.shape[1], found)
                    if not misses:
                        self._read_ahead()
            guesses = None
            if self.predictor is not None and self.current.decode:
                guesses = self._guesses(self.predictor, layer, hidden, top_k_index.shape[1])
            if guesses is not None and not misses:  # what this event waits for comes first
                self._prefetch(guesses)
                guesses = None
            if on_cpu is not None and not misses:  # behind what is foretold: that is wanted sooner
                self._admit(on_cpu.keys, recent)
            early = self._reading.taken[:]  # so that misses get their slots while the hits are computed
            while early:
                if self.cancelled.is_set():
                    raise Cancelled
                loading += self._compute_arrived(event, early, loading, misses)
            while hits:  # a slot of theirs may be the one that a miss waits for
                some = hits[: _WAVE if misses or self._reading.waits else None]
                del hits[: len(some)]
                loading += self._compute_ready(event, some, misses)
            while loading or misses or self._spare or (on_cpu is not None and on_cpu.left):
                if self.cancelled.is_set():
                    raise Cancelled
                if guesses is not None and not misses:
                    self._prefetch(guesses)
                    guesses = None
                if on_cpu is not None and on_cpu.left and not self._has_arrived(loading):
                    self._compute_on_cpu(event, on_cpu)
                    continue
                if not loading and not self._spare:  # prefetches hold the slots that are left
                    self._give_way()
                loading += self._compute_arrived(event, loading, loading, misses)
        finally:
            if on_cpu is not None:
                on_cpu.close()
            for key in loading:  # only after an error or a cancel
                self._settle(key, self._tickets)
            for key in self._reading.left(layer):
                self._keep(key)
            self.cache.end_event()
            self.transfers.events += 1
        output = event.result()
        self.transfers.compute_calls += event.calls + (on_cpu.calls if on_cpu is not None else 0)
        return output

    def end_token(self, seconds: float) -> None:
        """A pass that decodes took so long for each of its tokens, on the device's clock."""
        if self.predictor is not None:
            self.predictor.end_token(seconds)

    def begin_pass(self, tokens: int) -> None:
        """The forward pass :attr:`current` begins, over so many tokens: load what its first event is sure to take.

        An event whose pass was not announced does this itself, only later.
        """
        if self.current is not self._pass:
            self._pass, self._held = self.current, self.cache.resident().difference(self._coming)
            self._left_ahead = self._most_ahead * max(1, len(self.current.parts))
            self._reading.begin_pass(tokens)
            self._read_ahead()

    def foretell(self, layer: int, experts: list[int]) -> None:
        """The decoded token under way will take these experts: load them in time that the disk has left."""
        if self.current.decode and not self.cancelled.is_set():
            self._take_arrivals()
            self.begin_pass(1)
            self._prefetch([(layer, experts)])

    def settle(self) -> None:
        """Finish or drop all loads in flight, between two events, and forget where weights stand."""
        for tickets in (self._tickets, self._ahead, self._coming):
            for key in list(tickets):
                self._settle(key, tickets)
        self._reading.clear()
        self._views.clear()

    close = settle  # it can serve no event afterwards

    def _compute_arrived(
        self, event: EventCompute, some: list[ExpertKey], loading: list[ExpertKey], misses: list[ExpertKey]
    ) -> list[ExpertKey]:
        """Wait for the next of ``some`` of what is ``loading``; both lose what is then computed. Instead of waiting a
        few of the spare hits are computed, as long as there are any."""
        if self._spare and not self._has_arrived(some):
            wave = self._spare[: _WAVE if loading or misses or self._reading.waits else None]
            del self._spare[: len(wave)]
            return self._compute_ready(event, wave, misses)
        arrived = self._arrived(some, None if self.current.decode and not misses else _WAVE)
        for key in arrived:
            for keys in (some, loading) if some is not loading else (loading,):
                keys.remove(key)
            self._finish_load(key)
        return self._compute_ready(event, arrived, misses)

    def _arrived(self, loading: list[ExpertKey], most: int | None) -> list[ExpertKey]:
        """What to wait for and compute next, with many tokens at most so much.

        One token takes an expert less time than another call would cost, so all loads are awaited; with many tokens
        the first to arrive are computed while the rest is on its way. Always in the order in which they began: what is
        evicted must not depend on the disk's mood.
        """
        if self.current.one_token:
            return list(loading)
        return list(itertools.takewhile(lambda key: self._tickets[key].ready(), loading[:most])) or loading[:1]

    def _has_arrived(self, loading: list[ExpertKey]) -> bool:
        """Whether the device could go on, where it pays to look: one token's experts wait for all loads anyway."""
        return not self.current.one_token and bool(loading) and self._tickets[loading[0]].ready()

    def _compute_on_cpu(self, event: EventCompute, on_cpu: HostEvent) -> None:
        """With one token all at once, as one call is quickest; with many one expert, to look after the loads again."""
        keys = on_cpu.left[: None if self.current.one_token else 1]
        on_cpu.compute(event, keys)
        for key in keys:
            self.cache.release(key)
        self.transfers.computed_on_cpu += len(keys)
        self.transfers.not_moved_bytes += sum(self._file.layout(key.layer).record_bytes for key in keys)

    def _admit(self, keys: Sequence[ExpertKey], recent: Sequence[Sequence[int]] | None) -> None:
        """Copy some of what the CPU computes with, in idle time, where that repays. An event of many tokens leaves the
        slots to what its last tokens use."""
        assert self.host_experts is not None
        if recent is not None:
            used = {expert for group in recent for expert in group}
            keys = [key for key in keys if key.expert in used]
        best = self.host_experts.planner.hottest_first(keys)[: max(0, MOST_ADMITTED - len(self._ahead))]
        for key, slot, victim in self.cache.reserve_ahead(best, self.host_experts.repays):
            self._unused.discard(victim)  # type: ignore[arg-type]
            self._ahead[key] = self.loads.load(key, slot, victim=victim, prefetch=True)

    def _compute_ready(self, event: EventCompute, ready: list[ExpertKey], misses: list[ExpertKey]) -> list[ExpertKey]:
        """Compute and release ``ready``; starts loads of ``misses``, taken off the queue, in slots that come free.

        One slot at a time, so that the victims do not depend on how many are ready together. Without ``ready`` it
        starts what can be started now.
        """
        if ready:
            event.compute(ready)
            if self._tell_computed is not None:
                self._tell_computed([self.cache.slot(key) for key in ready])
        started = self._start_loads(misses) if misses and not ready else []
        for key in ready:
            useful = key is ready[-1] or self.cache.makes_room(key)  # else nothing can be had for its slot
            self.cache.release(key)
            if useful and misses:
                started += self._start_loads(misses)
            if useful and not misses:
                self._read_ahead()
        return started

    def _start_loads(self, misses: list[ExpertKey]) -> list[ExpertKey]:
        """Start as many of ``misses`` as slots can be had for, and take them off the queue."""
        reserved = self.cache.reserve(misses)
        for load in reserved:
            misses.remove(load.key)
        self._start(reserved, self._tickets)
        return [load.key for load in reserved]

    def _start(self, reserved: Sequence[Reservation], tickets: dict[ExpertKey, LoadTicket]) -> None:
        for number, (key, slot, victim) in enumerate(reserved):
            self._unused.discard(victim)  # type: ignore[arg-type]
            try:
                tickets[key] = self.loads.load(key, slot, victim=victim)
            except BaseException:  # no thread to be had: what has no ticket must not stay loading
                for load in reserved[number:]:
                    self.cache.abandon(load.key)
                    self._reading.forget(load.key)
                raise

    def _read_ahead(self) -> None:
        """Start loads of what the next event of a pass of many tokens will take, once this one's are under way."""
        reserved = self._reading.reserve()
        self._start(reserved, self._coming)
        self.transfers.read_ahead += len(reserved)

    def _keep(self, key: ExpertKey) -> None:
        """Wait for a record that was read ahead, so that what is held does not depend on when a read ends. One that
        failed is forgotten: a demand will tell why."""
        ticket = self._coming.pop(key)
        self._reading.forget(key)
        try:
            size, _ = ticket.wait()
        except Exception:
            ticket.settle()
            self.cache.abandon(key)
        else:
            self.cache.commit(key)
            self.transfers.count_bytes(size, self.current.decode)

    def _give_way(self) -> None:
        """Loads that the event does not need hold the slots that are left: end one."""
        if self._ahead:
            self._settle(next(iter(self._ahead)), self._ahead)
        else:
            self._keep(next(iter(self._coming)))

    def _finish_load(self, key: ExpertKey) -> None:
        ticket = self._tickets.pop(key)
        try:
            size, stalled = ticket.wait()
        except BaseException:
            ticket.settle()
            self.cache.abandon(key)
            raise
        self.cache.commit(key)
        self.transfers.stall_seconds += stalled
        self.transfers.count_bytes(size, self.current.decode)

    def _settle(self, key: ExpertKey, tickets: dict[ExpertKey, LoadTicket]) -> None:
        """Wait until nothing writes to the key's slot, then keep or give up the slot. Raises nothing."""
        if tickets.pop(key).settle():
            self.cache.commit(key)
        else:
            self.cache.abandon(key)
            self._unused.discard(key)

    def _guesses(self, predictor: Prefetcher, layer: int, hidden: torch.Tensor, top_k: int) -> Iterator[Guess]:
        """What is foretold after ``layer``, without what is not worth a copy."""
        found = predictor.guesses(layer, hidden, guesses_of(top_k, link=self.loads.link is not None))
        for steps, (after, experts) in enumerate(found, 1):
            keys = self.cache.keys(after, experts)
            absent = {key.expert for key in keys if self.cache.state(key) is SlotState.EMPTY}
            yield after, predictor.worth.choose(after, steps, experts, absent)

    def _prefetch(self, guesses: Iterable[Guess]) -> None:
        """Load what the next events will probably need, in time that the lanes have left.

        Those of a further layer only while fewer are under way than one layer's guesses: what waits long in a lane
        holds a slot for nothing.
        """
        for layer, experts in guesses:
            size = self._file.layout(layer).record_bytes
            room = self._left_ahead // size
            keys = []  # residents too: a prefetch must not displace them
            for key in self.cache.keys(layer, experts):
                absent = self.cache.state(key) is SlotState.EMPTY
                if room or not absent:
                    keys.append(key)
                    room -= absent
            for key, slot, victim in self.cache.reserve_ahead(keys):
                self._unused.discard(victim)  # type: ignore[arg-type]
                self._ahead[key] = self.loads.load(key, slot, victim=victim, prefetch=True)
                self._unused.add(key)
                self._left_ahead -= size
                self.transfers.prefetched += 1
                self.transfers.prefetch_bytes += size
            if len(self._ahead) >= len(experts):
                break

    def _take_arrivals(self) -> None:
        """Make the prefetches that have arrived ready; one that failed is forgotten: a demand will tell why."""
        for key in [key for key, ticket in self._ahead.items() if ticket.ready()]:
            ticket = self._ahead[key]
            self._settle(key, self._ahead)
            self.transfers.count_bytes(ticket.size, self.current.decode)

    def _sort_prefetches(self, layer: int, found: Lookup) -> None:
        """Those that this event needs become its loads; those that came too late are dropped if they have not begun."""
        for key in found.pending:
            if ticket := self._ahead.pop(key, None):
                ticket.promote()
                self._tickets[key] = ticket
            elif ticket := self._coming.pop(key, None):
                self._tickets[key] = ticket
                self.transfers.read_ahead_used += 1
        self._drop_late(layer)
        used = self._unused.intersection(found.hits) | self._unused.intersection(found.pending)
        self._unused -= used
        self.transfers.prefetch_used += len(used)

    def _drop_late(self, layer: int) -> None:
        for key in [key for key in self._ahead if key.layer == layer]:
            if self._ahead[key].drop():
                self._settle(key, self._ahead)

    def _weights(self, key: ExpertKey) -> Weights:
        assert self.cache.state(key) is SlotState.READY
        slot = self.cache.slot(key)
        layout = self._file.layout(key.layer)
        views = self._views.get((slot, id(layout)))
        if views is None:
            views = self._views[slot, id(layout)] = self._format.views(layout, self._arena.tensor(slot))
        return views


def _experts_function(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls; holds no state: the runtime hangs on the module."""
    if hidden_states.is_meta:  # shapes are being worked out for the memory plan
        return torch.zeros_like(hidden_states)
    runtime, layer = module.__dict__["run_local"]
    run = runtime.run if runtime.instead is None else runtime.instead
    return run(module, layer, hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]


register_experts_function(_experts_function)
