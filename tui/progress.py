"""Progress on stderr: a bar on a terminal, a few plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import TracebackType

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from offload.config import format_size
from offload.events import BatchProgress, LoadProgress, Notice, Planned, PrefillProgress
from tui.screen import Screen
from tui.status import figure, percent

PLAIN_INTERVAL_S = 10.0
Clock = Callable[[], float]


class _Bar:
    """A bar that shows on a terminal from its first update until :meth:`close`, which wipes it away."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def show(self, columns: tuple[ProgressColumn | str, ...], text: str, done: int, total: int | None) -> None:
        if self._progress is None:
            # rich would otherwise take stdout over, which belongs to the answers
            self._progress = Progress(
                *columns, console=self.screen.console, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._progress.start()
            self._task = self._progress.add_task(text, total=total, completed=done)
        elif self._task is not None:
            self._progress.update(self._task, description=text, total=total, completed=done)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LoadReporter(_Bar):
    """Shows downloads, packing and loading. Notices are printed at any time, after :meth:`close` too."""

    def __init__(self, screen: Screen, clock: Clock = time.monotonic) -> None:
        super().__init__(screen)
        self._clock = clock
        self._stage = ""
        self._finished = True
        self._said_at = 0.0

    def __enter__(self) -> LoadReporter:
        return self

    def __call__(self, event: LoadProgress | Notice | Planned) -> None:
        if isinstance(event, Planned):
            return  # the command plan shows it
        if isinstance(event, Notice):
            self.screen.note(event.text)
        elif self.screen.is_terminal:
            self._on_terminal(event)
        else:
            self._in_lines(event)

    def _on_terminal(self, event: LoadProgress) -> None:
        if event.stage != self._stage:
            self.close()
            self._stage = event.stage
        name = TextColumn("{task.description}", markup=False)
        if event.unit == "bytes":
            columns: tuple[ProgressColumn | str, ...] = (
                name, BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()
            )  # fmt: skip
        else:
            columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.show(columns, event.stage, event.done, event.total or None)

    def _in_lines(self, event: LoadProgress) -> None:
        now = self._clock()
        new = event.stage != self._stage
        finished = 0 < event.total <= event.done
        if not new and (self._finished or not (finished or now - self._said_at >= PLAIN_INTERVAL_S)):
            return
        self._stage, self._finished, self._said_at = event.stage, finished, now
        done, total = (format_size(n) if event.unit == "bytes" else str(n) for n in (event.done, event.total))
        self.screen.note(f"{event.stage}: {done}" + (f" of {total}" if event.total else ""))


class PrefillReporter(_Bar):
    """Shows how much of the prompt is read, until the first token comes."""

    def __init__(self, screen: Screen, clock: Clock = time.monotonic) -> None:
        super().__init__(screen)
        self._clock = clock
        self._said_at = clock()

    def __enter__(self) -> PrefillReporter:
        return self

    def __call__(self, event: PrefillProgress) -> None:
        if event.done >= event.total:
            self.close()
            return
        if self.screen.is_terminal:
            name = TextColumn("{task.description}", markup=False)
            self.show((name, BarColumn(), MofNCompleteColumn()), "reading the prompt", event.done, event.total)
        elif self._clock() - self._said_at >= PLAIN_INTERVAL_S:
            self._said_at = self._clock()
            self.screen.note(f"reading the prompt: {event.done} of {event.total} tokens")


class BatchReporter(_Bar):
    """Shows the rows done, the speed and the hit rate of a batch.

    Lines instead of a bar also where the answers themselves go to the terminal.
    """

    def __init__(self, screen: Screen, answers_on_stdout: bool = False, clock: Clock = time.monotonic) -> None:
        super().__init__(screen)
        self._lines = not screen.is_terminal or (answers_on_stdout and screen.shares_terminal)
        self._clock = clock
        self._said_at = clock()

    def __enter__(self) -> BatchReporter:
        return self

    def __call__(self, progress: BatchProgress) -> None:
        if not self._lines:
            columns = (BarColumn(), TextColumn("{task.description}", markup=False), TimeRemainingColumn())
            self.show(columns, self._describe(progress), progress.rows_done, progress.rows_total)
        elif self._clock() - self._said_at >= PLAIN_INTERVAL_S:
            self._said_at = self._clock()
            self.screen.note(self._describe(progress))

    def _describe(self, progress: BatchProgress) -> str:
        total = "" if progress.rows_total is None else f" of {progress.rows_total}"
        return " | ".join(
            (
                f"{progress.rows_done}{total} rows, {progress.errors} with an error",
                f"{progress.new_tokens + progress.row_tokens} tokens",
                f"{figure(progress.tokens_per_s)} tokens/s",
                f"hit rate {percent(progress.hit_rate)}",
                *self._further(progress),
            )
        )

    def _further(self, progress: BatchProgress) -> Iterator[str]:
        if progress.bytes_per_token is not None:
            yield f"read {progress.bytes_per_token / 1e6:.1f} MB a token"
        if progress.running > 1:
            yield f"{progress.running} rows at once"
        if self._lines and progress.eta_s is not None:  # a bar has its own
            yield f"{timedelta(seconds=round(progress.eta_s))} left"
