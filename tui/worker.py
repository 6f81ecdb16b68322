"""The thread that owns the engine: it opens models, answers, and changes settings between tokens."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from offload.config import EngineSettings, SamplingSettings
from offload.errors import RunLocalError
from offload.events import Done, Event, LoadProgress, Notice, Planned
from offload.protocol import EngineHost, LiveEngine
from tui.asking import start_answer
from tui.conversation import Conversation, Turn
from tui.failures import describe_failure


class OpenCancelled(RunLocalError):
    """The user gave a load up. Raised through the engine's progress calls."""


@dataclass(frozen=True, slots=True)
class Loading:
    """Something happened while a model is opened."""

    event: LoadProgress | Notice | Planned


@dataclass(frozen=True, slots=True)
class Opened:
    engine: LiveEngine
    settings: EngineSettings


@dataclass(frozen=True, slots=True)
class NotOpened:
    """``cancelled``: by the user. ``settings`` are those that were tried."""

    settings: EngineSettings
    problem: str
    cancelled: bool


@dataclass(frozen=True, slots=True)
class Answering:
    """An event of an answer."""

    event: Event


@dataclass(frozen=True, slots=True)
class Dropped:
    """The answer that begins is based on ``turns`` fewer turns than was asked for; ``text`` says so."""

    turns: int
    text: str


@dataclass(frozen=True, slots=True)
class AnswerFailed:
    """An answer ended without a Done, or could not begin."""

    problem: str


@dataclass(frozen=True, slots=True)
class Called:
    """A call is through: ``result``, or what went wrong as one line."""

    name: str
    result: Any
    problem: str | None


News = Loading | Opened | NotOpened | Answering | Dropped | AnswerFailed | Called
Job = Callable[[], None]


class EngineWorker:
    """Runs jobs one after the other on a thread of its own, and tells ``deliver`` (called on that thread) of them.

    All methods may be called from another thread and return at once, :meth:`close` excepted.
    """

    def __init__(self, host: EngineHost, deliver: Callable[[News], None]) -> None:
        self._host = host
        self._deliver = deliver
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._calls: SimpleQueue[Job] = SimpleQueue()
        self._engine: LiveEngine | None = None
        self._stop = threading.Event()
        self._leave = threading.Event()
        self._cancel_open = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.close_problem: str | None = None
        self._thread.start()

    def open(self, settings: EngineSettings) -> None:
        """Open a model, after closing the one before."""
        self._cancel_open.clear()
        self._jobs.put(lambda: self._open(settings))

    def cancel_open(self) -> None:
        """Give the opening up at its next progress."""
        self._cancel_open.set()

    def ask(self, conversation: Conversation, base: Sequence[Turn], question: str, sampling: SamplingSettings) -> None:
        """Answer ``question`` after ``base``; ``conversation`` is used for its system prompt."""
        self._stop.clear()
        self._jobs.put(lambda: self._ask(conversation, base, question, sampling))

    def stop(self) -> None:
        """Stop the answer between two tokens."""
        self._stop.set()
        if (engine := self._engine) is not None:
            engine.cancel()

    def call(self, name: str, action: Callable[[LiveEngine], Any]) -> None:
        """Do something with the engine: between two tokens if an answer is on its way."""
        self._calls.put(lambda: self._call(name, action))
        self._jobs.put(self._run_calls)

    def list_models(self) -> None:
        """Look for models; comes back as a call named "models"."""
        self._jobs.put(self._list_models)

    def close(self, timeout: float = 30.0) -> None:
        """Stop what is running, close the engine, end the thread; gives up waiting after ``timeout`` seconds."""
        self._leave.set()
        self._cancel_open.set()
        self.stop()
        self._jobs.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not self._leave.is_set():
                job()
        self._close_engine()

    def _open(self, settings: EngineSettings) -> None:
        def told(event: LoadProgress | Notice | Planned) -> None:
            if self._cancel_open.is_set():
                raise OpenCancelled("loading was cancelled")
            self._deliver(Loading(event))

        try:
            self._close_engine()
            engine = self._host.open(settings, told)
        except BaseException as error:
            cancelled = self._cancel_open.is_set()
            gc.collect()  # what was loaded half
            self._deliver(NotOpened(settings, describe_failure(error), cancelled))
            return
        self._engine = engine
        self._deliver(Opened(engine, settings))

    def _ask(self, conversation: Conversation, base: Sequence[Turn], question: str, sampling: SamplingSettings) -> None:
        engine = self._engine
        if engine is None:
            self._deliver(AnswerFailed("no model is loaded; choose one with /models"))
            return
        try:
            started = start_answer(engine, conversation, base, question, sampling)
            if told := started.tell_dropped():
                self._deliver(Dropped(started.dropped, told))
            for event in started.events:
                self._deliver(Answering(event))
                if isinstance(event, Done):
                    return
                if self._stop.is_set():  # one that came before the generation began was lost
                    engine.cancel()
                self._run_calls()
            raise RuntimeError("the engine ended an answer without a Done event")
        except BaseException as error:
            self._deliver(AnswerFailed(describe_failure(error)))

    def _call(self, name: str, action: Callable[[LiveEngine], Any]) -> None:
        engine = self._engine
        if engine is None:
            self._deliver(Called(name, None, "no model is loaded; choose one with /models"))
            return
        try:
            result = action(engine)
        except BaseException as error:
            self._deliver(Called(name, None, describe_failure(error)))
        else:
            self._deliver(Called(name, result, None))

    def _run_calls(self) -> None:
        while not self._calls.empty():
            self._calls.get()()

    def _list_models(self) -> None:
        try:
            self._deliver(Called("models", self._host.models(), None))
        except BaseException as error:
            self._deliver(Called("models", [], describe_failure(error)))

    def _close_engine(self) -> None:
        engine, self._engine = self._engine, None
        if engine is None:
            return
        try:
            self._host.close(engine)
        except BaseException as error:
            self.close_problem = describe_failure(error)
        del engine
        with suppress(Exception):
            gc.collect()
