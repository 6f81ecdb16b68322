"""The thread that a sweep of ``/tune`` is watched from, beside the one of the engine, so that answers go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from offload.errors import RunLocalError
from offload.events import LoadProgress
from offload.protocol import TuneJob, TuneReport
from tui.failures import describe_failure


class TuneCancelled(RunLocalError):
    """The user gave a sweep up. Raised through its progress calls."""


@dataclass(frozen=True, slots=True)
class TuneProgress:
    job: TuneJob
    event: LoadProgress


@dataclass(frozen=True, slots=True)
class TuneEnded:
    """``report``, or what went wrong as one line. Of a sweep that was cancelled there is no such news."""

    job: TuneJob
    report: TuneReport | None
    problem: str | None


TuneNews = TuneProgress | TuneEnded


class Tuner:
    """Runs one sweep at a time and tells ``deliver`` (called on its thread) of it."""

    def __init__(self, deliver: Callable[[TuneNews], None]) -> None:
        self._deliver = deliver
        self._cancelled = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, job: TuneJob) -> None:
        """Give up the sweep that runs, if one does, and begin another."""
        self.cancel()
        cancelled = self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(job, cancelled), name="tuning", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """Give up the sweep at its next step; nothing is told of it any more. Returns at once."""
        self._cancelled.set()

    def close(self, timeout: float = 5.0) -> None:
        """Cancel, and wait for the end; gives up waiting after ``timeout`` seconds."""
        self.cancel()
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self, job: TuneJob, cancelled: threading.Event) -> None:
        def told(event: LoadProgress) -> None:
            if cancelled.is_set():
                raise TuneCancelled("tuning was cancelled")
            self._deliver(TuneProgress(job, event))

        try:
            ended = TuneEnded(job, job(told), None)
        except BaseException as error:
            ended = TuneEnded(job, None, describe_failure(error))
        if not cancelled.is_set():
            self._deliver(ended)
