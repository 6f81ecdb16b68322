"""Measures generations: from raw counters and clocks to :class:`offload.events.RunStats`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import psutil

from offload.config import DEFAULT_SCOPE
from offload.devices.base import Device
from offload.events import ByteStats, ExpertStats, MemoryStats, RunStats, SecondStats, TierStats
from offload.memory.process import rss_peak_bytes
from offload.memory.storage import AnyPlan
from offload.memory.tier_plan import TierPlan
from offload.model.experts import ExpertRuntime
from offload.model.forward_pass import TransferCounters

_TRANSFERS = tuple(item.name for item in fields(TransferCounters))
"""Counters of the runtime that a tally has under the same names."""


@dataclass(slots=True)
class Tally:
    """Sums over one generation or a session. Seconds are wall time.

    ``decode_steps`` are tokens that decoding ran, in ``decode_passes`` forward passes. A pass of a batch in which some
    rows read their prompts counts as prefill, with all its tokens.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefilled_tokens: int = 0
    decode_steps: int = 0
    decode_passes: int = 0
    prefill_passes: int = 0
    needed_bytes: int = 0
    shared_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    total_seconds: float = 0.0
    stall_seconds: float = 0.0
    disk_seconds: float = 0.0
    prefill_bytes: int = 0
    decode_bytes: int = 0
    hits: int = 0
    pending: int = 0
    misses: int = 0
    decode_hits: int = 0
    decode_accesses: int = 0
    prefetched: int = 0
    prefetch_used: int = 0
    prefetch_bytes: int = 0
    read_ahead: int = 0
    read_ahead_used: int = 0
    events: int = 0
    compute_calls: int = 0
    computed_on_cpu: int = 0
    not_moved_bytes: int = 0
    stall_link_seconds: float = 0.0
    to_device: int = 0
    to_host: int = 0
    host_hits: int = 0
    host_misses: int = 0
    demoted: int = 0
    first_token_seconds: list[float] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))

    def plus(self, other: Tally) -> Tally:
        """Both together, as a copy."""
        both = Tally()
        both.add(self)
        both.add(other)
        return both

    def count_pass(self, seconds: float, tokens: Sequence[int], decode: bool) -> None:
        """A forward pass over ``tokens`` of each row took ``seconds``."""
        if decode:
            self.decode_seconds += seconds
            self.decode_steps += sum(tokens)
            self.decode_passes += 1
        else:
            self.prefill_seconds += seconds
            self.prefilled_tokens += sum(tokens)
            self.prefill_passes += 1

    def count_shared(self, tokens: int) -> None:
        """So many tokens of a prompt were copied from another row."""
        self.shared_tokens += tokens

    def since(self, earlier: Tally) -> Tally:
        """What came on top of ``earlier``, a copy of these sums from before."""
        part = Tally()
        for item in fields(self):
            now, before = getattr(self, item.name), getattr(earlier, item.name)
            setattr(part, item.name, now[len(before) :] if isinstance(now, list) else now - before)
        return part


class Meter:
    """One generation's clocks and what it adds to the runtime's counters."""

    def __init__(self, runtime: ExpertRuntime, device: Device) -> None:
        self.tally = Tally()
        self._runtime = runtime
        self._now = device.now
        self._started = self._now()
        self._before = self._counters()

    def first_token(self) -> None:
        self.tally.first_token_seconds = [self._now() - self._started]

    def read(self) -> Tally:
        """:attr:`tally`, brought up to now. At the end of the generation and at any time before."""
        for name, value in self._counters().items():
            setattr(self.tally, name, value - self._before[name])
        self.tally.total_seconds = self._now() - self._started
        return self.tally

    def peek(self, stall_link: float) -> Tally:
        """As :meth:`read`, but a copy: for other threads. ``stall_link``: what :meth:`Loads.stall_link_seconds` last
        told the engine's thread, since no other may ask."""
        now = self.tally.plus(Tally())
        for name, value in self._counters(stall_link).items():
            setattr(now, name, value - self._before[name])
        now.total_seconds = self._now() - self._started
        return now

    def _counters(self, stall_link: float | None = None) -> dict[str, float]:
        counters = self._runtime.cache.counters
        prefill, decode = counters.prefill, counters.decode
        transfers, loads = self._runtime.transfers, self._runtime.loads
        counts = {
            "hits": prefill.hits + decode.hits,
            "pending": prefill.pending + decode.pending,
            "misses": prefill.misses + decode.misses,
            "decode_hits": decode.hits,
            "decode_accesses": decode.accesses,
            "disk_seconds": loads.busy_seconds(),
            **{name: getattr(transfers, name) for name in _TRANSFERS},
        }
        if loads.link is not None and loads.host is not None:
            counts |= {
                "stall_link_seconds": stall_link if stall_link is not None else loads.stall_link_seconds() or 0.0,
                "to_device": loads.link.host_to_device,
                "to_host": loads.link.device_to_host,
                "host_hits": loads.host.hits,
                "host_misses": loads.host.misses,
                "demoted": loads.host.demoted,
            }
        return counts


@dataclass(frozen=True, slots=True)
class RunLabels:
    """What stays the same over a session."""

    model: str
    device: str
    format: str
    dense_format: str
    policy: str
    prefetch: str
    start_s: float | None
    scope: str = DEFAULT_SCOPE
    miss: str | None = None
    host_policy: str | None = None


def run_stats(tally: Tally, labels: RunLabels, plan: AnyPlan, device: Device, seed: int | None) -> RunStats:
    """Statistics from sums; whatever did not happen is None. ``ttft_s`` is the mean over generations."""
    accesses = tally.hits + tally.pending + tally.misses
    memory = device.memory()
    linked = memory is not None
    return RunStats(
        model=labels.model,
        device=labels.device,
        format=labels.format,
        dense_format=labels.dense_format,
        policy=labels.policy,
        scope=labels.scope,
        prefetch=labels.prefetch,
        miss=labels.miss,
        host_policy=labels.host_policy,
        seed=seed,
        prompt_tokens=tally.prompt_tokens,
        new_tokens=tally.new_tokens,
        start_s=labels.start_s,
        ttft_s=_ratio(sum(tally.first_token_seconds), len(tally.first_token_seconds)),
        prefill_tokens_per_s=_ratio(tally.prefilled_tokens, tally.prefill_seconds),
        decode_tokens_per_s=_ratio(tally.decode_steps, tally.decode_seconds),
        experts=ExpertStats(
            accesses=accesses,
            hits=tally.hits,
            pending=tally.pending,
            misses=tally.misses,
            computed_on_cpu=tally.computed_on_cpu if linked else None,
            hit_rate=_ratio(tally.hits, accesses),
            decode_hit_rate=_ratio(tally.decode_hits, tally.decode_accesses),
            prefetched=tally.prefetched,
            prefetch_used=tally.prefetch_used,
            events=tally.events,
            compute_calls=tally.compute_calls,
            read_ahead=tally.read_ahead,
            read_ahead_used=tally.read_ahead_used,
        ),
        bytes=ByteStats(
            disk_read=tally.prefill_bytes + tally.decode_bytes,
            host_to_device=tally.to_device if linked else None,
            device_to_host=tally.to_host if linked else None,
            not_moved=tally.not_moved_bytes if linked else None,
            per_decode_token=_ratio(tally.decode_bytes, tally.decode_steps),
            needed=tally.needed_bytes,
            prefetched=tally.prefetch_bytes,
        ),
        seconds=SecondStats(
            compute=tally.total_seconds - tally.stall_seconds - tally.stall_link_seconds,
            stall_disk=tally.stall_seconds,
            stall_link=tally.stall_link_seconds if linked else None,
            total=tally.total_seconds,
            disk_busy=None if device.virtual else tally.disk_seconds,
        ),
        memory=MemoryStats(
            rss_peak_bytes=rss_peak_bytes(),
            ram_budget_bytes=plan.budget,
            vram_peak_bytes=None if memory is None else memory.peak,
            vram_budget_bytes=None if memory is None else memory.budget,
            expert_slots=plan.slots,
            residency=plan.residency,
        ),
        shared_prompt_tokens=tally.shared_tokens,
        decode_passes=tally.decode_passes,
        prefill_passes=tally.prefill_passes,
        prefilled_tokens=tally.prefilled_tokens,
        host_tier=TierStats(
            slots=plan.host_slots,
            hits=tally.host_hits,
            misses=tally.host_misses,
            hit_rate=_ratio(tally.host_hits, tally.host_hits + tally.host_misses),
            demoted=tally.demoted,
        )
        if isinstance(plan, TierPlan)
        else None,
        virtual=device.virtual,
    )


def seconds_since_process_start() -> float:
    """Wall time since this process was started."""
    return max(0.0, time.time() - psutil.Process().create_time())


def _ratio(top: float, bottom: float) -> float | None:
    return top / bottom if bottom else None
