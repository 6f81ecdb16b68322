"""A scripted engine that can be watched and changed, and a host that opens it. No torch, no model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from offload.config import EngineSettings, SamplingSettings
from offload.errors import ModelError, RunLocalError, UsageError
from offload.events import (
    CacheSnapshot,
    Event,
    ExpertState,
    LiveChanges,
    LoadProgress,
    Notice,
    Planned,
    RunStats,
    TierUse,
    Token,
    TokenSample,
)
from offload.protocol import LiveEngine, Message, ModelChoice, OnLoad, TuneJob, TuneReport
from tests.tui.fake_engine import FakeEngine, run_stats

POLICIES = ("ewma", "lfu", "lru")


def snapshot(
    layers: int = 4,
    experts: int = 8,
    stats: RunStats | None = None,
    recent: Sequence[TokenSample] = (TokenSample(6, 1, 3, 2_500_000, 0.1, 0.02),),
    current: LiveChanges | None = None,
    **changes: Any,
) -> CacheSnapshot:
    """A cache in which expert e of layer l is ready if l + e is even, hit now if e is 0, missed now if e is 1."""
    made = CacheSnapshot(
        layers=tuple(range(layers)),
        states=tuple(
            bytes(ExpertState.READY if (layer + e) % 2 == 0 else ExpertState.ABSENT for e in range(experts))
            for layer in range(layers)
        ),
        last_use=tuple([9, 9] + [-1] * (experts - 2) for _ in range(layers)),
        last_miss=tuple([-1, 9] + [-1] * (experts - 2) for _ in range(layers)),
        hits=tuple([5] + [0] * (experts - 1) for _ in range(layers)),
        misses=tuple([0, 2] + [0] * (experts - 2) for _ in range(layers)),
        forward=9,
        tiers=(TierUse("RAM", 16, 16, 7),),
        recent=tuple(recent),
        stats=stats or run_stats(),
        ttft_s=0.25,
        context_used=120,
        rss_bytes=2**30,
        vram_bytes=None,
        current=current or LiveChanges(policy="ewma", prefetch="off", residency=0.5, ram=2**31),
    )
    return replace(made, **changes)


@dataclass
class FakeLiveEngine(FakeEngine):
    """``gate``: if given, the answer waits before each token until it is released."""

    gate: threading.Semaphore | None = None
    current: LiveChanges = field(
        default_factory=lambda: LiveChanges(policy="ewma", prefetch="off", residency=0.5, ram=2**31)
    )
    changes: list[LiveChanges] = field(default_factory=list)
    change_threads: set[str] = field(default_factory=set)
    tracing: bool = False
    job: TuneJob = lambda tell: tune_report()

    def generate(self, prompt: str | Sequence[Message], sampling: SamplingSettings) -> Iterator[Event]:
        events = super().generate(prompt, sampling)
        return self._gated(events)

    def _gated(self, events: Iterator[Event]) -> Iterator[Event]:
        for event in events:
            if isinstance(event, Token) and self.gate is not None:
                while not self.gate.acquire(timeout=0.05) and not self._cancelled:
                    pass
            yield event

    def snapshot(self) -> CacheSnapshot:
        measured = self.new_tokens > 0
        stats = replace(run_stats(0, self.new_tokens, measured), policy=self.current.policy or "")
        if not measured:
            stats = replace(stats, experts=replace(stats.experts, hits=0, pending=0, misses=0))
        recent = (TokenSample(6, 1, 3, 2_500_000, 0.1, 0.02),) * self.new_tokens
        return snapshot(stats=stats, recent=recent, current=self.current, ttft_s=0.25 if measured else None)

    def stats(self) -> RunStats:
        return self.snapshot().stats

    def change(self, changes: LiveChanges) -> None:
        if changes.policy is not None and changes.policy.partition(":")[0] not in POLICIES:
            raise UsageError(f"--policy: unknown policy '{changes.policy}'; there are {', '.join(POLICIES)}")
        self.changes.append(changes)
        self.change_threads.add(threading.current_thread().name)
        given = {item.name: getattr(changes, item.name) for item in fields(changes)}
        self.current = replace(self.current, **{name: value for name, value in given.items() if value is not None})

    @property
    def choices(self) -> Mapping[str, Sequence[str]]:
        return {"policy": POLICIES, "prefetch": ("off", "next-gate")}

    def start_trace(self) -> None:
        if self.tracing:
            raise UsageError("the routing is being recorded already")
        self.tracing = True

    def stop_trace(self, path: Path) -> int:
        if not self.tracing:
            raise UsageError("nothing is being recorded; start it first")
        path.write_bytes(b"trace")
        self.tracing = False
        return 42

    def tune_job(self) -> TuneJob:
        return self.job

    def expert_score(self, layer: int, expert: int) -> float | None:
        return 10 * layer + expert if expert else None


def tune_row(policy: str, scope: str, hit_rate: float) -> dict[str, Any]:
    """One way in the JSON of a sweep at 16 slots."""
    return {
        "policy": policy, "scope": scope, "predictor": None, "learn": False, "slots": 16, "residency": 0.5,
        "hit_rate": hit_rate, "hit_rate_spread": 0.01, "below_belady": 0.9 - hit_rate, "tokens_per_s": None,
    }  # fmt: skip


def tune_report(policy: str = "lfu", scope: str = "layer") -> TuneReport:
    """A sweep in which ``policy`` won over ewma with the scope global."""
    rows = [tune_row("lru", "global", 0.6), tune_row("ewma", "global", 0.7), tune_row(policy, scope, 0.75)]
    wins = (policy, scope) != ("ewma", "global")
    advice = {
        "slots": 16, "residency": 0.5, "policy": policy, "scope": scope, "is_default": not wins,
        "default": {"policy": "ewma", "scope": "global"}, "gain": 0.05, "gain_spread": 0.02,
        "gain_by_fold": [0.03, 0.07], "gain_unit": "points of hit rate (of 1)", "cross_validated": True,
    }  # fmt: skip
    found = {"model": "fake", "requests": 3, "folds": 2, "events": 99, "slots": 16, "results": rows, "advice": [advice]}
    changes = LiveChanges(policy=policy, scope=scope) if wins else LiveChanges()
    flags = (("--policy", policy), ("--scope", scope), ("--residency", "0.5"))
    return TuneReport(found, changes, flags, ("a note",))


PLAN = Planned(("fake on cpu: a budget of 2.00 GiB", "16 expert slots"), (("skeleton", 2**28, "attention"),))


@dataclass
class FakeHost:
    """Opens ``engines`` by the name of the model; a name that is not there cannot be loaded.

    ``script`` is called while a model is opened, with what tells of progress; it may wait, and raise.
    """

    engines: dict[str, FakeLiveEngine] = field(default_factory=lambda: {"demo": FakeLiveEngine()})
    script: Callable[[OnLoad], None] = lambda tell: None
    opened: list[EngineSettings] = field(default_factory=list)
    close_error: RunLocalError | None = None

    def open(self, settings: EngineSettings, on_event: OnLoad) -> LiveEngine:
        on_event(Notice(f"using {settings.model}"))
        on_event(PLAN)
        on_event(LoadProgress("load", 50, 100, "bytes"))
        self.script(on_event)
        on_event(LoadProgress("load", 100, 100, "bytes"))
        if settings.model not in self.engines:
            raise ModelError(f"model '{settings.model}' is not in the cache; run once with the hub to download it")
        self.opened.append(settings)
        return self.engines[settings.model]

    def close(self, engine: LiveEngine) -> None:
        engine.close()
        if self.close_error is not None:
            raise self.close_error

    def models(self) -> list[ModelChoice]:
        return [ModelChoice("demo", "demo", "", None, "small"), ModelChoice("org/big", "hub cache", "", 2**34)]
