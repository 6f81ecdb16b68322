"""Ctrl-C while an answer is on its way: the first stops the answer, the second leaves."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from offload.protocol import ChatEngine


class CancelOnInterrupt:
    """While entered, the first SIGINT cancels the engine's generation and the second raises KeyboardInterrupt.

    Raising at once would tear the engine out of a forward pass. Does nothing outside the main thread, or where SIGINT
    is ignored (a shell's background job).
    """

    def __init__(self, engine: ChatEngine) -> None:
        self._engine = engine
        self._previous: Any = None
        self._installed = False
        self.interrupted = False

    def __enter__(self) -> CancelOnInterrupt:
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

    def insist(self) -> None:
        """Cancel again after an interrupt: one that came before the generation had begun may have been lost."""
        if self.interrupted:
            self._engine.cancel()

    def _on_interrupt(self, signal_number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self._engine.cancel()
