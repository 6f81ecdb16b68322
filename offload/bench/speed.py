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
from offload.events import Done, Notice, RowDone, RowsPass, RunStats, Token
from offload.memory.work import Rates, Work
from offload.protocol import BenchEngine, PreparedRow, RowEngine

DEFAULT_SEED = 0
DEFAULT_TEMPERATURE = 1.0


@dataclass(frozen=True, slots=True)
class SpeedReport:
    """What was measured, at least one run. The expert cache was empty before the first alone."""

    right: ClassVar[tuple[int, ...]] = (1, 2, 3, 4)

    workload: Workload
    runs: tuple[BenchRun, ...]
    rows_at_once: int = 1

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
                "rows_at_once": self.rows_at_once,
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
        if self.rows_at_once > 1:
            lines.append(f"{self.rows_at_once} rows at once, each with so many tokens")
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
    rates: Rates | None = None,
) -> SpeedReport:
    """Run ``workload`` ``repeat`` times, each from an empty KV cache, on an engine that was just opened.

    An engine for several rows runs as many at once, each with a prompt of its own. ``rates`` of this machine give the
    bounds beside the times.

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
        rows = engine.rows_at_once if isinstance(engine, RowEngine) else 1
        chance = random.Random(seed)
        prompts = [chance.choices(ordinary, k=workload.prompt) for _ in range(rows)]
        settings = replace(
            sampling,
            temperature=DEFAULT_TEMPERATURE if sampling.temperature is None else sampling.temperature,
            max_new_tokens=workload.marked + workload.new,
            stop=(),
            seed=seed,
            ignore_eos=True,
        )
        lap = _Laps(engine, workload, rows, opened if not runs else None)
        if rows > 1:
            _run_rows(engine, prompts, settings, lap)  # type: ignore[arg-type]
        else:
            _run_one(engine, prompts[0], settings, lap)
        run = lap.run(seed, engine.work(), rates)
        runs.append(run)
        if repeat > 1:
            rate = run.measured.decode_tokens_per_s
            on_event(Notice(f"run {number + 1} of {repeat}: " + ("-" if rate is None else f"{rate:.2f} tokens/s")))
    return SpeedReport(workload, tuple(runs), engine.rows_at_once if isinstance(engine, RowEngine) else 1)


class _Laps:
    """Takes the times of one generation where its parts end. ``opened``: when the engine was, on the clock of
    ``perf_counter``, if this is the first.
    """

    def __init__(self, engine: BenchEngine, workload: Workload, rows: int, opened: float | None) -> None:
        engine.reset()
        engine.lap()
        self._engine = engine
        self._opened = opened
        # new tokens of all rows at the ends of prefill, warm-up and measured part
        self._marks = [rows, rows * workload.marked, rows * (workload.marked + workload.new)]
        self._laps: list[RunStats] = []
        self._to_first: float | None = None
        self._tokens = 0

    def at(self, tokens: int) -> None:
        """So many new tokens there are. Called at the token itself: what follows the last one is not decoding."""
        self._tokens = tokens
        while len(self._laps) < 3 and tokens >= self._marks[len(self._laps)]:
            self._laps.append(self._engine.lap())
            if len(self._laps) == 1 and self._opened is not None and self._laps[0].start_s is not None:
                self._to_first = self._laps[0].start_s + time.perf_counter() - self._opened

    def run(self, seed: int, work: Work, rates: Rates | None) -> BenchRun:
        if len(self._laps) != 3:
            raise RunLocalError(f"the generation ended after {self._tokens} of {self._marks[-1]} tokens")
        prefill, warmup, measured = self._laps
        return BenchRun(seed, prefill, warmup, measured, self._to_first, work, rates)


def _run_one(engine: BenchEngine, prompt: list[int], settings: SamplingSettings, laps: _Laps) -> None:
    tokens = 0
    for event in engine.generate_ids(prompt, settings):
        if isinstance(event, Done):
            _check_end(event)
        if isinstance(event, Token):
            tokens += 1
            laps.at(tokens)


def _run_rows(engine: RowEngine, prompts: list[list[int]], settings: SamplingSettings, laps: _Laps) -> None:
    """All prompts at once; row ``i`` has the seed ``seed + i``."""
    seed = settings.seed or 0
    rows = [PreparedRow(tuple(ids), replace(settings, seed=(seed + n) % 2**63)) for n, ids in enumerate(prompts)]
    done = 0
    for event in engine.generate_rows(lambda room: rows.pop() if rows else None):
        if isinstance(event, RowDone):
            _check_end(event)
            done += event.new_tokens
        elif isinstance(event, RowsPass):
            laps.at(done + event.new_tokens)


def _check_end(event: Done | RowDone) -> None:
    if event.reason == "error":
        raise RunLocalError(event.error or "the generation failed")
    if event.reason == "cancelled":
        raise KeyboardInterrupt
