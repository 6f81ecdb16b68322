"""Notices that the terminal is gone: its window was closed, a connection broke, or its program was killed.

A signal tells of that only where the terminal controls this process. Without one, reading from a terminal that is gone
returns nothing at once, for ever, and Textual would read it again and again.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Sequence

_LOST_FOCUS = b"\x1b[O"
"""What a terminal may say at any time, and nobody minds."""
_GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL


class HangupWatch:
    """Calls ``on_hangup`` once, on a thread of its own, when one of ``descriptors`` is a terminal no more.

    Those that are gone lead nowhere from then on, so that nobody fails or spins on them. The process ends with ``code``
    if it is still there ``patience`` seconds later.
    """

    def __init__(
        self,
        on_hangup: Callable[[], None],
        code: int,
        descriptors: Sequence[int] = (0, 1, 2),
        patience: float = 60.0,
        interval: float = 0.2,
    ) -> None:
        self._descriptors = [descriptor for descriptor in descriptors if os.isatty(descriptor)]
        self._on_hangup = on_hangup
        self._code = code
        self._patience = patience
        self._interval = interval
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="hangup", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer, and do not end the process."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            if gone := [descriptor for descriptor in self._descriptors if _is_gone(descriptor)]:
                _lead_nowhere(gone)
                self._on_hangup()
                if not self._stopped.wait(self._patience):
                    os._exit(self._code)
                return


def _is_gone(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & _GONE for _, events in poll.poll(0))


def _lead_nowhere(descriptors: Sequence[int]) -> None:
    silent, kept_open = os.pipe()  # not readable while it is open, as the end of a file always is
    os.write(kept_open, _LOST_FOCUS)  # for a reader that was just about to read, and would wait for ever
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(silent if descriptor == 0 else nowhere, descriptor)
