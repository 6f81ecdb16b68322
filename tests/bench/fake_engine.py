"""A scripted engine for measuring: says of each generation what it is told to. No torch, no model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from offload.config import SamplingSettings
from offload.events import Done, Event, PrefillProgress, RunStats, Token
from offload.memory.work import Work
from tests.tui.fake_engine import FakeEngine, run_stats


def lap(tokens: int, rate: float | None = None, total: float = 1.0, stall: float = 0.0) -> RunStats:
    """Statistics of a part of a generation: ``tokens`` at ``rate`` tokens/s within ``total`` seconds."""
    stats = run_stats(0, tokens)
    seconds = replace(stats.seconds, total=total, stall_disk=stall, compute=total - stall)
    return replace(stats, decode_tokens_per_s=rate, seconds=seconds)


@dataclass
class FakeBenchEngine(FakeEngine):
    """Generation ``i`` runs at ``rates[i]``, the last one again and again; ``waits`` hangs in the first one."""

    rates: Sequence[float] = (10.0,)
    error: str | None = None
    longest: int = 10**9
    waits: bool = False
    resets: int = 0
    prompts: list[list[int]] = field(default_factory=list)  # type: ignore[assignment]
    _tokens: int = 0
    _counted: int = 0

    def generate_ids(self, ids: Sequence[int], sampling: SamplingSettings) -> Iterator[Event]:
        self.prompts.append(list(ids))
        self.samplings.append(sampling)
        yield PrefillProgress(len(ids), len(ids), 0)
        given = min(self.longest, sampling.max_new_tokens)
        if self.error is not None:
            yield Done("error", "", len(ids), 0, run_stats(), self.error)
            return
        for number in range(given):
            self._tokens += 1
            yield Token("x", number)
        while self.waits:
            time.sleep(0.01)
        if given == sampling.max_new_tokens:
            yield Token("tail", 0)  # what the detokeniser held back
        yield Done("length", "x" * given, len(ids), given, run_stats())

    def work(self) -> Work:
        return Work(1000, 100, {0: 10.0})

    def ordinary_ids(self) -> list[int]:
        return list(range(100, 200))

    def reset(self) -> None:
        self.resets += 1

    def lap(self) -> RunStats:
        tokens, self._counted = self._tokens - self._counted, self._tokens
        return lap(tokens, self.rates[min(len(self.prompts), len(self.rates)) - 1])
