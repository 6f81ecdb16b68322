"""Runs the rows of a batch on an engine, one by one or many at a time. Imports no torch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from offload.config import SamplingSettings
from offload.errors import ContextError, RunLocalError
from offload.events import BatchProgress, Done, Notice, RowDone, RunStats, Token
from offload.generation.batch import InputRow, OutputRow, parse_row
from offload.protocol import ChatEngine, PreparedRow, RowEngine

LOOKAHEAD = 256
"""Rows that are read ahead to choose the next one from, where the order of the output is free."""
_STATS_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """What a run did: rows skipped (done before), rows written and how many of those hold an error.

    ``interrupted`` or ``gave_up`` (too many errors): rows are left. ``mean_running`` is the mean number of rows in a
    forward pass.
    """

    skipped: int
    written: int
    errors: int
    new_tokens: int
    interrupted: bool
    gave_up: bool = False
    prompt_tokens: int = field(default=0, compare=False)
    rows_at_once: int = field(default=1, compare=False)
    mean_running: float | None = field(default=None, compare=False)
    seconds: float = field(default=0.0, compare=False)

    @property
    def failed(self) -> bool:
        """Not one row went well, or too many did not."""
        return self.gave_up or self.written == self.errors > 0

    def describe(self) -> str:
        """One line for people."""
        before = f"; {self.skipped} rows were done before" if self.skipped else ""
        errors = f", {self.errors} of them with an error" if self.errors else ""
        stopped = "; stopped because of the errors (--max-errors)" if self.gave_up else ""
        return f"{self.written} rows written{errors}, {self.new_tokens} new tokens{before}{stopped}"

    def to_json(self) -> dict[str, Any]:
        """What ``--stats-json`` holds under "batch"."""
        return asdict(self)


class RowSink(Protocol):
    """Where output rows go."""

    def write(self, line: bytes) -> None:
        """Write one row whole or not at all. Raises RunLocalError if it cannot be written."""
        ...


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """``ordered``: rows come out in the order of the input. ``max_errors``: take no more rows after so many errors.
    ``lookahead``: how many rows may be read before one of them runs.
    """

    ordered: bool = False
    max_errors: int | None = None
    lookahead: int = 1


def run_batch(
    engine: ChatEngine,
    lines: Iterable[bytes],
    sink: RowSink,
    sampling: SamplingSettings,
    base_seed: int,
    *,
    options: BatchOptions | None = None,
    done_before: Counter[str] | None = None,
    rows_total: int | None = None,
    on_progress: Callable[[BatchProgress], None] = lambda progress: None,
    on_notice: Callable[[Notice], None] = lambda notice: None,
    should_stop: Callable[[], bool] = lambda: False,
    should_cancel: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> BatchSummary:
    """Run the rows of ``lines``; blank lines are skipped. Rows share forward passes if the engine can do that.

    ``done_before`` counts the output rows of an earlier run by :attr:`InputRow.key`; as many rows of that id are
    skipped. After ``should_stop`` no row is begun, and those in flight are finished; after ``should_cancel`` they are
    dropped.

    Raises RunLocalError if an output row cannot be written.
    """
    run = _Run(engine, sink, options or BatchOptions(), rows_total, on_progress, on_notice, clock)
    run.input = run.read(lines, sampling, base_seed, Counter(done_before or {}))
    shares = isinstance(engine, RowEngine) and engine.rows_at_once > 1
    if shares:
        run.share_passes(engine, should_stop, should_cancel)  # type: ignore[arg-type]
    else:
        run.one_by_one(should_stop, should_cancel)
    return run.summary(engine.rows_at_once if shares else 1)  # type: ignore[attr-defined]


@dataclass(slots=True)
class _Pending:
    """A row that was read: its place in the input, and how it will run."""

    place: int
    row: InputRow
    prepared: PreparedRow | None = None


class _Run:
    """One run: what was read, what is in flight, what was written."""

    def __init__(
        self,
        engine: ChatEngine,
        sink: RowSink,
        options: BatchOptions,
        rows_total: int | None,
        on_progress: Callable[[BatchProgress], None],
        on_notice: Callable[[Notice], None],
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._sink = sink
        self._options = options
        self._total = rows_total
        self._on_progress = on_progress
        self._on_notice = on_notice
        self._clock = clock
        self._started = clock()
        self._stats: RunStats = engine.stats()
        self._stats_at = clock()
        self._skipped = self._written = self._errors = self._new_tokens = self._prompt_tokens = 0
        self._interrupted = False
        self._passes = self._ran = 0
        self._unwritten: Counter[str] = Counter()  # ids of rows that were read and not written
        self._after: dict[str, list[OutputRow]] = {}  # rows that must not be written before the first with their id
        self._early: dict[int, OutputRow] = {}  # finished before an earlier row, where the order is kept
        self._next_place = 0
        self.input: Iterator[_Pending] = iter(())

    def read(
        self, lines: Iterable[bytes], sampling: SamplingSettings, base_seed: int, left: Counter[str]
    ) -> Iterator[_Pending]:
        """The rows that were not done before, with an error where a row cannot run."""
        seen: set[str] = set()
        place = 0
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row = parse_row(line, number, sampling, base_seed)
            repeated = row.key in seen
            seen.add(row.key)
            if left[row.key] > 0:
                left[row.key] -= 1
                self._skipped += 1
                continue
            if repeated and row.error is None:
                row = InputRow(row.id, error="an earlier row has the same id")
            yield _Pending(place, row)
            place += 1

    def one_by_one(self, should_stop: Callable[[], bool], should_cancel: Callable[[], bool]) -> None:
        for pending in self.input:
            if self._must_stop(should_stop):
                return
            self._tell(1, 0)

            def on_token(tokens: int) -> None:
                self._tell(1, tokens)
                if should_cancel():
                    self._engine.cancel()

            result = _answer(self._engine, pending.row, on_token, self._on_notice)
            if result is None:
                self._interrupted = True
                return
            self._finish(pending, result)
            self._tell(0, 0, now=True)

    def share_passes(
        self, engine: RowEngine, should_stop: Callable[[], bool], should_cancel: Callable[[], bool]
    ) -> None:
        flying: dict[int, _Pending] = {}
        window: list[_Pending] = []
        taken = 0

        def take(room: int) -> PreparedRow | None:
            nonlocal taken
            if self._must_stop(should_stop, bool(window)):
                return None
            pending = self._choose(engine, window, room)
            if pending is None:
                return None
            flying[taken] = pending
            taken += 1
            return pending.prepared

        self._tell(0, 0)
        for event in engine.generate_rows(take):
            if should_cancel():
                self._engine.cancel()
            if isinstance(event, Notice):
                self._on_notice(event)
                continue
            if not isinstance(event, RowDone):
                self._passes += 1
                self._ran += max(1, event.running)
                self._tell(event.running, event.new_tokens)
                continue
            pending = flying.pop(event.row)
            if event.reason == "cancelled":
                self._interrupted = True
                continue
            self._finish(
                pending,
                _output(pending.row, event),
            )

    def summary(self, rows_at_once: int) -> BatchSummary:
        return BatchSummary(
            self._skipped,
            self._written,
            self._errors,
            self._new_tokens,
            self._interrupted,
            self._gave_up(),
            self._prompt_tokens,
            rows_at_once,
            self._ran / self._passes if self._passes else None,
            self._clock() - self._started,
        )

    def _gave_up(self) -> bool:
        return self._options.max_errors is not None and self._errors >= self._options.max_errors

    def _must_stop(self, should_stop: Callable[[], bool], left: bool = True) -> bool:
        """Whether no other row may begin. ``left``: there is one that will not run because of that."""
        if self._gave_up():
            return True
        if should_stop():
            self._interrupted = self._interrupted or left or next(self.input, None) is not None
            return True
        return False

    def _choose(self, engine: RowEngine, window: list[_Pending], room: int) -> _Pending | None:
        """The next row to run, of at most ``room`` tokens: of those read ahead the one with the most, since a long one
        that begins last runs alone in the end. Where the order is kept it is the first, or none.
        """
        ahead = 1 if self._options.ordered else max(1, self._options.lookahead)
        while len(window) < ahead and not self._gave_up():
            pending = next(self.input, None)
            if pending is None:
                break
            row = pending.row
            self._unwritten[row.key] += 1
            if row.error is not None or row.sampling is None:
                self._finish(pending, OutputRow(row.id, None, "error", None, None, row.error))
                continue
            try:
                pending.prepared = engine.prepare(row.prompt, row.sampling)
            except RunLocalError as problem:
                self._finish(pending, _refused(row, problem))
            else:
                window.append(pending)
        context = self._engine.context_tokens

        def tokens(pending: _Pending) -> int:
            return pending.prepared.most_tokens(context) if pending.prepared is not None else 0

        fitting = [pending for pending in window if tokens(pending) <= room]
        if not fitting:
            return None
        chosen = max(fitting, key=tokens)  # of equals the first
        window.remove(chosen)
        return chosen

    def _finish(self, pending: _Pending, row: OutputRow) -> None:
        """Write the row now, or as soon as those are written that must come before it."""
        if self._options.ordered:
            self._early[pending.place] = row
            while (ready := self._early.pop(self._next_place, None)) is not None:
                self._write(ready)
                self._next_place += 1
            return
        key = pending.row.key
        self._unwritten[key] -= 1
        if pending.row.error is not None and self._unwritten[key] > 0:
            self._after.setdefault(key, []).append(row)  # --resume counts the rows of an id from the first one on
            return
        self._write(row)
        for later in self._after.pop(key, ()):
            self._write(later)

    def _write(self, row: OutputRow) -> None:
        self._sink.write(row.to_line())
        self._written += 1
        self._errors += row.error is not None
        self._new_tokens += row.new_tokens or 0
        self._prompt_tokens += row.prompt_tokens or 0

    def _tell(self, running: int, row_tokens: int, now: bool = False) -> None:
        """``now``: fetch the statistics even if the last ones are fresh."""
        at = self._clock()
        if now or at - self._stats_at >= _STATS_INTERVAL_S:
            self._stats, self._stats_at = self._engine.stats(), at
        stats = self._stats
        seconds = at - self._started
        tokens = self._new_tokens + row_tokens
        rows_left = None if self._total is None else self._total - self._skipped - self._written
        read = stats.bytes.disk_read
        self._on_progress(
            BatchProgress(
                rows_done=self._skipped + self._written,
                rows_total=self._total,
                errors=self._errors,
                new_tokens=self._new_tokens,
                row_tokens=row_tokens,
                tokens_per_s=tokens / seconds if tokens and seconds > 0 else None,
                hit_rate=stats.experts.hit_rate,
                running=running,
                bytes_per_token=read / stats.new_tokens if stats.new_tokens else None,
                eta_s=seconds / self._written * rows_left if rows_left is not None and self._written else None,
            )
        )


def _answer(
    engine: ChatEngine, row: InputRow, on_token: Callable[[int], None], on_notice: Callable[[Notice], None]
) -> OutputRow | None:
    """The output of one row that runs by itself; None if it was cancelled."""
    if row.error is not None or row.sampling is None:
        return OutputRow(row.id, None, "error", None, None, row.error)
    tokens = 0
    try:
        for event in engine.generate(row.prompt, row.sampling):
            if isinstance(event, Done):
                if event.reason == "cancelled":
                    return None
                return _output(row, event)
            if isinstance(event, Notice):
                on_notice(event)
            tokens += isinstance(event, Token)
            on_token(tokens)
    except RunLocalError as problem:
        return _refused(row, problem)
    raise RuntimeError("the engine ended an answer without a Done event")


def _output(row: InputRow, done: Done | RowDone) -> OutputRow:
    error = done.error or "the generation failed" if done.reason == "error" else None
    return OutputRow(row.id, done.text, done.reason, done.prompt_tokens, done.new_tokens, error, done.reasoning or None)


def _refused(row: InputRow, problem: RunLocalError) -> OutputRow:
    tokens = problem.prompt_tokens if isinstance(problem, ContextError) else None
    return OutputRow(row.id, None, "error", tokens, None, str(problem))
