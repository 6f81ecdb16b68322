"""Ctrl-C while answers are on their way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from offload.protocol import ChatEngine


class _OnInterrupt:
    """While entered, SIGINT calls :meth:`_on_interrupt` instead of tearing the engine out of a forward pass.

    Does nothing outside the main thread, or where SIGINT is ignored (a shell's background job).
    """

    def __init__(self, engine: ChatEngine) -> None:
        self._engine = engine
        self._previous: Any = None
        self._installed = False
        self.interrupted = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.getsignal(signal.SIGINT)
            if self._previous is not signal.SIG_IGN:
                signal.signal(signal.SIGINT, self._on_interrupt)
                self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous or signal.default_int_handler)
            self._installed = False

    def _on_interrupt(self, signal_number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class CancelOnInterrupt(_OnInterrupt):
    """The first Ctrl-C cancels the engine's generation and the second raises KeyboardInterrupt."""

    def insist(self) -> None:
        """Cancel again after an interrupt: one that came before the generation had begun may have been lost."""
        if self.interrupted:
            self._engine.cancel()

    def _on_interrupt(self, signal_number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self._engine.cancel()


class FinishOnInterrupt(_OnInterrupt):
    """For batches: the first Ctrl-C lets the rows in flight finish, the second cancels them, the third raises
    KeyboardInterrupt. ``note`` shows a line after the first.
    """

    def __init__(self, engine: ChatEngine, note: Callable[[str], None]) -> None:
        super().__init__(engine)
        self._note = note
        self.cancelled = False

    def _on_interrupt(self, signal_number: int, frame: FrameType | None) -> None:
        if self.cancelled:
            raise KeyboardInterrupt
        if not self.interrupted:
            self.interrupted = True
            self._note("finishing the rows that are running; Ctrl-C again drops them")
            return
        self.cancelled = True
        self._engine.cancel()
