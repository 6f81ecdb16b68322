"""What a front end watches while the engine works: the latest tokens, the state of every expert, the recording."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cache.expert_cache import SlotState
from cache.keys import ExpertKey
from cache.policies import runtime_policies
from cache.trace import Trace, TraceRecorder
from cache.usage import ExpertUsage
from offload.config import MISSES, PREFETCHES, SCOPES, EngineSettings
from offload.errors import RunLocalError, UsageError
from offload.events import CacheSnapshot, ExpertState, LiveChanges, RunStats, TierUse, TokenSample
from offload.memory.process import rss_bytes
from offload.memory.storage import AnyPlan, Storage
from offload.memory.tier_plan import TierPlan
from offload.memory.tiers import TieredLoads
from offload.meter import Tally
from offload.model.experts import ExpertRuntime
from offload.protocol import TuneJob

RECENT_TOKENS = 64
_STATES = {SlotState.LOADING: ExpertState.LOADING, SlotState.READY: ExpertState.READY}


@dataclass(frozen=True, slots=True)
class Watched:
    """What an engine adds to a snapshot: its sums and statistics, the running generation included."""

    sums: Tally
    stats: RunStats
    context_used: int
    plan: AnyPlan
    settings: EngineSettings


class LiveView:
    """Keeps what snapshots need beside the counters. All but :meth:`snapshot` is for the engine's thread alone."""

    def __init__(self, runtime: ExpertRuntime, usage: ExpertUsage, storage: Storage) -> None:
        self.lock = threading.Lock()  # held while a generation's sums move into the session's
        self._runtime = runtime
        self._usage = usage
        self._storage = storage
        self.stall_link = 0.0  # seconds, as the engine's thread last knew them
        self._recent: deque[TokenSample] = deque(maxlen=RECENT_TOKENS)
        self._before = self._sums()

    @property
    def tiered(self) -> bool:
        """Whether there is memory below the slots."""
        return self._storage.loads.link is not None

    def start_token(self) -> None:
        """A decoding forward pass begins."""
        self._before = self._sums()

    def end_token(self, seconds: float) -> None:
        """It took ``seconds``."""
        now = self._sums()
        hits, pending, misses, read, stalled, moved, waited = (
            after - before for after, before in zip(now, self._before, strict=True)
        )
        self.stall_link = now[-1]
        sample = TokenSample(int(hits), int(pending), int(misses), int(read), seconds, stalled)
        if self._storage.loads.link is not None:
            sample = replace(sample, link_bytes=int(moved), stall_link=waited)
        self._recent.append(sample)

    def snapshot(self, now: Watched) -> CacheSnapshot:
        """See :class:`offload.events.CacheSnapshot`."""
        usage, cache = self._usage, self._runtime.cache
        rows = {layer: bytearray(len(row)) for layer, row in zip(usage.layers, usage.hits, strict=True)}
        occupied, memory = cache.occupancy(), self._storage.device.memory()
        if isinstance(loads := self._storage.loads, TieredLoads):
            for layer, expert in loads.tier.resident():
                rows[layer][expert] = ExpertState.HOSTED
        for (layer, expert), state in occupied:
            rows[layer][expert] = _STATES[state]
        return CacheSnapshot(
            layers=usage.layers,
            states=tuple(bytes(row) for row in rows.values()),
            last_use=tuple(row[:] for row in usage.last_use),
            last_miss=tuple(row[:] for row in usage.last_miss),
            hits=tuple(row[:] for row in usage.hits),
            misses=tuple(row[:] for row in usage.misses),
            forward=usage.forward,
            tiers=self._tiers(len(occupied), now.stats.experts.hits),
            recent=tuple(self._recent),
            stats=now.stats,
            ttft_s=now.sums.first_token_seconds[-1] if now.sums.first_token_seconds else None,
            context_used=now.context_used,
            rss_bytes=rss_bytes(),
            vram_bytes=None if memory is None else memory.used,
            current=_current(now.settings, now.plan),
        )

    @property
    def slots(self) -> int:
        """Of the device."""
        return self._runtime.cache.slots

    def expert_score(self, layer: int, expert: int) -> float | None:
        """See :meth:`offload.protocol.LiveEngine.expert_score`."""
        return self._runtime.cache.policy.score_now(ExpertKey(layer, expert))

    def _sums(self) -> tuple[float, ...]:
        counters, transfers = self._runtime.cache.counters.decode, self._runtime.transfers
        link, stall_link = self._storage.loads.link, self._storage.loads.stall_link_seconds()
        return (
            counters.hits,
            counters.pending,
            counters.misses,
            transfers.decode_bytes,
            transfers.stall_seconds,
            link.host_to_device if link is not None else 0,
            stall_link or 0.0,
        )

    def _tiers(self, used: int, hits: int) -> tuple[TierUse, ...]:
        slots, loads = self._runtime.cache.slots, self._storage.loads
        if not isinstance(loads, TieredLoads):
            return (TierUse("RAM", used, slots, hits),)
        host = loads.tier
        return TierUse("VRAM", used, slots, hits), TierUse("RAM", host.used, host.slots, host.counters.hits)


class Recording:
    """The routing trace of a part of a session: the runtime records while it has a recorder."""

    def __init__(self, runtime: ExpertRuntime, new_recorder: Callable[[], TraceRecorder]) -> None:
        self._runtime = runtime
        self._new_recorder = new_recorder
        self._own: TraceRecorder | None = None

    def start(self) -> None:
        """See :meth:`offload.protocol.LiveEngine.start_trace`."""
        if self._runtime.recorder is not None:
            raise UsageError("the routing is being recorded already")
        self._own = self._runtime.recorder = self._new_recorder()

    def stop(self, path: Path) -> int:
        """See :meth:`offload.protocol.LiveEngine.stop_trace`."""
        if self._own is None:
            elsewhere = self._runtime.recorder is not None
            raise UsageError(
                "--trace-out records until the end" if elsewhere else "nothing is being recorded; start it first"
            )
        save_file(self._own.save, path)
        rows, self._own, self._runtime.recorder = len(self._own), None, None
        return rows

    def so_far(self) -> Trace:
        """What was recorded, by :meth:`start` or for ``--trace-out``. Raises UsageError if there is nothing."""
        recorder = self._runtime.recorder
        if recorder is None:
            raise UsageError("nothing is being recorded; start it first")
        if not len(recorder):
            raise UsageError("nothing was recorded yet; ask something first")
        try:
            return recorder.trace()
        except OSError as error:
            raise RunLocalError(f"the recorded routing cannot be read ({error.strerror or error})") from error


def save_file(save: Callable[[Path], None], path: Path, source: str = "") -> None:
    """``save(path)``. Raises RunLocalError, beginning with ``source``, if the file cannot be written."""
    try:
        save(path)
    except OSError as error:
        raise RunLocalError(f"{source}{path} cannot be written ({error.strerror or error})") from error


class LiveMethods(ABC):
    """The part of :class:`offload.protocol.LiveEngine` that only watches: an engine inherits it."""

    def __init__(self, live: LiveView, recording: Recording) -> None:
        self._live = live
        self._recording = recording

    @abstractmethod
    def _watched(self) -> Watched:
        """Called from other threads."""

    def snapshot(self) -> CacheSnapshot:
        """See :meth:`offload.protocol.LiveEngine.snapshot`."""
        return self._live.snapshot(self._watched())

    @property
    def choices(self) -> Mapping[str, Sequence[str]]:
        """See :attr:`offload.protocol.LiveEngine.choices`."""
        names: dict[str, Sequence[str]] = {"policy": runtime_policies(), "scope": SCOPES, "prefetch": PREFETCHES}
        return names | ({"miss": MISSES, "host_policy": runtime_policies()} if self._live.tiered else {})

    def start_trace(self) -> None:
        """See :meth:`offload.protocol.LiveEngine.start_trace`."""
        self._recording.start()

    def stop_trace(self, path: Path) -> int:
        """See :meth:`offload.protocol.LiveEngine.stop_trace`."""
        return self._recording.stop(path)

    def tune_job(self) -> TuneJob:
        """See :meth:`offload.protocol.LiveEngine.tune_job`."""
        from offload.laboratory.beside import BesideTuning

        watched = self._watched()
        return BesideTuning(self._recording.so_far(), self._live.slots, watched.settings.policy, watched.settings.scope)

    def expert_score(self, layer: int, expert: int) -> float | None:
        """See :meth:`offload.protocol.LiveEngine.expert_score`."""
        return self._live.expert_score(layer, expert)


def _current(settings: EngineSettings, plan: AnyPlan) -> LiveChanges:
    """The settings of an engine as :class:`LiveChanges` names them."""
    return LiveChanges(
        policy=settings.policy,
        scope=settings.scope,
        prefetch=settings.prefetch,
        miss=settings.miss if isinstance(plan, TierPlan) else None,
        host_policy=settings.host_policy if isinstance(plan, TierPlan) else None,
        residency=plan.residency,
        ram=plan.budget,
        vram=plan.vram_budget if isinstance(plan, TierPlan) else None,
    )
