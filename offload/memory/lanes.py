"""Transfer lanes: loads in flight, and the tickets to wait on."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, Protocol

from cache.keys import ExpertKey


class Mover(Protocol):
    """What a lane's workers do for a load; called from several threads at once."""

    def read_into(self, key: ExpertKey, buffer: Any) -> int:
        """Bring the record of ``key`` to ``buffer``; returns the bytes that were read from disk."""
        ...


class Dropped(Exception):
    """The load was given up before it started. Never reaches a front end."""


class Ticket:
    """One load on its way. The error of a failed load comes out of :meth:`wait`."""

    __slots__ = ("_buffer", "_done", "_error", "_lane", "key", "prefetch", "size")

    def __init__(self, lane: DiskLane, key: ExpertKey, buffer: Any, prefetch: bool) -> None:
        self.key = key
        self.prefetch = prefetch
        self._lane = lane
        self._buffer = buffer
        self._done = threading.Event()
        self.size = 0  # bytes that arrived
        self._error: BaseException | None = None

    def ready(self) -> bool:
        """Whether :meth:`wait` would return (or raise) at once."""
        return self._done.is_set()

    def wait(self) -> tuple[int, float]:
        """Wait for the load; returns its bytes and the seconds that this call waited. Raises the load's error."""
        stalled = 0.0
        if not self._done.is_set():
            started = time.perf_counter()
            self._done.wait()
            stalled = time.perf_counter() - started
        if self._error is not None:
            raise self._error
        return self.size, stalled

    def promote(self) -> None:
        """An event waits for this prefetch now: from here on it is a demand."""
        self._lane._promote(self)

    def drop(self) -> bool:
        """Give the load up if it has not started; tells whether it is given up. A running one goes on."""
        return self._lane._drop(self)

    def settle(self) -> bool:
        """Drop the load, or wait for it: nothing writes to the slot any more. True if the record arrived whole."""
        self.drop()
        self._done.wait()
        return self._error is None


class DiskLane:
    """Loads by a few workers, since a single reader leaves an NVMe disk half idle.

    Two priorities: a prefetch starts only while no demand waits or is being read, and only half of the workers prefetch
    at a time, so that a demand always finds a free one.
    """

    def __init__(self, file: Mover, workers: int, name: str = "disk") -> None:
        self._file = file
        self._workers = workers
        self._name = name
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()  # guards all below
        self._demand: deque[Ticket] = deque()
        self._prefetch: deque[Ticket] = deque()
        self._running: set[Ticket] = set()
        self._closed = False
        self._busy_since = 0.0
        self._busy_seconds = 0.0

    def load(self, key: ExpertKey, buffer: Any, *, prefetch: bool = False) -> Ticket:
        """Start reading the record of ``key`` into ``buffer``, which must not be touched until the ticket is done.

        Raises RuntimeError if the system gives no thread for it, or the lane is closed.
        """
        ticket = Ticket(self, key, buffer, prefetch)
        with self._changed:
            if self._closed:
                raise RuntimeError(f"the {self._name} lane is closed")
            self._start_threads()
            (self._prefetch if prefetch else self._demand).append(ticket)
            self._changed.notify()
        return ticket

    def busy_seconds(self) -> float:
        """Time so far during which at least one read was running."""
        with self._changed:
            running = time.perf_counter() - self._busy_since if self._running else 0.0
            return self._busy_seconds + running

    def close(self) -> None:
        """Stop: loads that have not started are dropped, running ones are waited for."""
        with self._changed:
            self._closed = True
            for ticket in (*self._demand, *self._prefetch):
                ticket._error = Dropped()
                ticket._done.set()
            self._demand.clear()
            self._prefetch.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _start_threads(self) -> None:
        while len(self._threads) < self._workers:
            thread = threading.Thread(target=self._work, name=f"{self._name}-lane-{len(self._threads)}", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                if not self._threads:
                    raise
                self._workers = len(self._threads)  # fewer readers are slower, not wrong
                return
            self._threads.append(thread)

    def _promote(self, ticket: Ticket) -> None:
        with self._changed:
            ticket.prefetch = False
            if ticket in self._prefetch:
                self._prefetch.remove(ticket)
                self._demand.append(ticket)
            self._changed.notify()

    def _drop(self, ticket: Ticket) -> bool:
        with self._changed:
            queue = self._prefetch if ticket.prefetch else self._demand
            if ticket in queue:
                queue.remove(ticket)
                ticket._error = Dropped()
                ticket._done.set()
        return isinstance(ticket._error, Dropped)

    def _work(self) -> None:
        while (ticket := self._next()) is not None:
            try:
                ticket.size = self._file.read_into(ticket.key, ticket._buffer)
            except BaseException as error:
                ticket._error = error
            with self._changed:
                self._running.remove(ticket)
                if not self._running:
                    self._busy_seconds += time.perf_counter() - self._busy_since
                if self._prefetch:  # this may have been the demand that they waited for
                    self._changed.notify_all()
            ticket._done.set()

    def _next(self) -> Ticket | None:
        """Wait for the next load that may start, and count it as running; None when the lane is closed."""
        with self._changed:
            while not self._closed:
                queue = self._demand
                if not queue and self._is_idle():
                    queue = self._prefetch
                if queue:
                    ticket = queue.popleft()
                    if not self._running:
                        self._busy_since = time.perf_counter()
                    self._running.add(ticket)
                    return ticket
                self._changed.wait()
        return None

    def _is_idle(self) -> bool:
        """Whether there is time for one more prefetch."""
        running = self._running
        return len(running) < max(1, self._workers // 2) and all(ticket.prefetch for ticket in running)
