"""Measures generations of one engine. Imports no torch."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from offload.bench.figures import TABLE, BenchRun, spreads
from offload.bench.request import Workload
from offload.config import SamplingSettings
from offload.errors import RunLocalError
from offload.events import Done, Notice, RunStats, Token
from offload.protocol import BenchEngine

DEFAULT_SEED = 0
DEFAULT_TEMPERATURE = 1.0


@dataclass(frozen=True, slots=True)
class SpeedReport:
    """What was measured, at least one run. The expert cache was empty before the first alone."""

    right: ClassVar[tuple[int, ...]] = (1, 2, 3, 4)

    workload: Workload
    runs: tuple[BenchRun, ...]

    @property
    def stats(self) -> RunStats:
        """Of the run with the median rate; of two in the middle the slower one."""
        ordered = sorted(self.runs, key=lambda run: run.measured.decode_tokens_per_s or 0.0)
        return ordered[(len(ordered) - 1) // 2].stats

    def to_json(self) -> dict[str, Any]:
        figures = [run.figures() for run in self.runs]
        return self.stats.to_json() | {
            "bench": {
                "prompt_tokens": self.workload.prompt,
                "warmup_tokens": self.workload.marked,
                "new_tokens": self.workload.new,
                "repeat": len(self.runs),
                "runs": [{"seed": run.seed} | each for run, each in zip(self.runs, figures, strict=True)],
                "summary": {name: found and asdict(found) for name, found in spreads(figures).items()},
            }
        }

    def summary(self) -> list[str]:
        """Lines to read before the table."""
        stats, work = self.stats, self.workload
        lines = [
            f"{stats.model} on {stats.device}: format {stats.format}, policy {stats.policy}, prefetch "
            f"{stats.prefetch}, {stats.memory.expert_slots} expert slots ({stats.memory.residency:.0%} of the experts)",
            f"{work.prompt} prompt tokens, {work.marked} new ones to warm up, {work.new} measured; seed "
            f"{self.runs[0].seed}",
        ]
        if len(self.runs) > 1:
            lines.append(f"{len(self.runs)} runs; the expert cache was empty before the first alone")
        return lines

    def rows(self) -> list[tuple[str, ...]]:
        """One row for each figure; of several runs the first (cold) one, median, least and most."""
        figures = [run.figures() for run in self.runs]
        several = len(self.runs) > 1
        rows: list[tuple[str, ...]] = [("FIGURE", "FIRST", "MEDIAN", "MIN", "MAX") if several else ("FIGURE", "VALUE")]
        for figure, found in zip(TABLE, spreads(figures).values(), strict=True):
            cells = [figure.text(figures[0][figure.name])]
            if several:
                cells += [figure.text(getattr(found, part, None)) for part in ("median", "min", "max")]
            rows.append((figure.label, *cells))
        budget = TABLE[-1].show(self.stats.memory.ram_budget_bytes)
        rows.append(("memory budget", *([budget] + [""] * (len(rows[0]) - 2))))
        return rows


def measure(
    engine: BenchEngine,
    workload: Workload,
    sampling: SamplingSettings,
    repeat: int,
    on_event: Callable[[Notice], None],
) -> SpeedReport:
    """Run ``workload`` ``repeat`` times, each from an empty KV cache, on an engine that was just opened.

    Run ``i`` has seed ``seed + i`` for its prompt and its choices: other tokens, so that it does not find the experts
    of the run before, and the same ones under every setting. Tells of each run as it ends: a progress bar would
    take time from what is measured.

    Raises UsageError if the context is too small, RunLocalError if a generation fails.
    """
    opened = time.perf_counter()
    workload.check_context(engine.context_tokens)
    ordinary = engine.ordinary_ids()
    first_seed = DEFAULT_SEED if sampling.seed is None else sampling.seed
    runs: list[BenchRun] = []
    for number in range(repeat):
        seed = (first_seed + number) % 2**63
        prompt = random.Random(seed).choices(ordinary, k=workload.prompt)
        settings = replace(
            sampling,
            temperature=DEFAULT_TEMPERATURE if sampling.temperature is None else sampling.temperature,
            max_new_tokens=workload.marked + workload.new,
            stop=(),
            seed=seed,
            ignore_eos=True,
        )
        run = _measure_once(engine, workload, prompt, settings, opened if not runs else None)
        runs.append(run)
        if repeat > 1:
            rate = run.measured.decode_tokens_per_s
            on_event(Notice(f"run {number + 1} of {repeat}: " + ("-" if rate is None else f"{rate:.2f} tokens/s")))
    return SpeedReport(workload, tuple(runs))


def _measure_once(
    engine: BenchEngine, workload: Workload, prompt: list[int], settings: SamplingSettings, opened: float | None
) -> BenchRun:
    """One generation. ``opened``: when the engine was, on the clock of ``perf_counter``, if this is the first."""
    engine.reset()
    engine.lap()
    laps: list[RunStats] = []
    to_first: float | None = None
    tokens = 0
    for event in engine.generate_ids(prompt, settings):
        if isinstance(event, Done):
            if event.reason == "error":
                raise RunLocalError(event.error or "the generation failed")
            if event.reason == "cancelled":
                raise KeyboardInterrupt
        if not isinstance(event, Token):
            continue
        tokens += 1
        if tokens == 1:
            laps.append(engine.lap())
            if opened is not None and laps[0].start_s is not None:
                to_first = laps[0].start_s + time.perf_counter() - opened
        # at the token itself: what follows the last one is not decoding
        if tokens in (workload.marked, workload.marked + workload.new):
            laps.append(engine.lap())
    if len(laps) != 3:
        raise RunLocalError(f"the generation ended after {tokens} of {workload.marked + workload.new} tokens")
    prefill, warmup, measured = laps
    return BenchRun(settings.seed or 0, prefill, warmup, measured, to_first)
