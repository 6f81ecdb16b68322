"""The streams of the pretend GPU: work that really runs on threads of its own, in order, and the fences between them.

Which work is ordered before which is known from the fences that were waited for, not from when the threads got to it.
So a missing wait is found every time, and not only when the timing is unlucky.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from offload.devices.base import Fence


class SimFence(Fence):
    """``time`` is when it is passed on the virtual clock."""

    def __init__(self, stream: SimStream, number: int, time: float = 0.0) -> None:
        self.stream = stream
        self.number = number
        self.time = time

    def done(self) -> bool:
        return self.stream.passed(self.number)

    def wait(self) -> None:
        self.stream.wait_until(self.number)


class SimStream:
    """One queue of work with a thread. The error of a piece of work comes out of the next wait, as CUDA's do."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.observed = 0  # the host knows that work up to this number is done
        self.joined: dict[SimStream, int] = {}  # work of other streams that this one has waited for
        self._changed = threading.Condition()
        self._work: deque[tuple[Callable[[], None], tuple[Fence, ...]]] = deque()
        self._submitted = self._finished = 0
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def launch(self, work: Callable[[], None], after: Sequence[Fence] = (), time: float = 0.0) -> SimFence:
        """Queue ``work`` behind all before it and behind ``after``."""
        with self._changed:
            if self._closed:
                raise RuntimeError(f"the {self.name} stream is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"simulated-{self.name}", daemon=True)
                self._thread.start()
            for fence in after:
                assert isinstance(fence, SimFence)
                self.joined[fence.stream] = max(self.joined.get(fence.stream, 0), fence.number)
            self._work.append((work, tuple(after)))
            self._submitted += 1
            self._changed.notify_all()
            return SimFence(self, self._submitted, time)

    def fence(self, time: float = 0.0) -> SimFence:
        """Behind everything that was launched so far."""
        with self._changed:
            return SimFence(self, self._submitted, time)

    def join(self, fence: SimFence) -> None:
        """What is launched from now on waits for ``fence``."""
        self.launch(lambda: None, (fence,))

    def ordered_after(self, fence: SimFence) -> bool:
        """Whether what is launched now runs after ``fence`` whatever the threads do."""
        if fence.stream is self or fence.number <= fence.stream.observed:
            return True
        return self.joined.get(fence.stream, 0) >= fence.number

    def passed(self, number: int) -> bool:
        with self._changed:
            done = self._finished >= number
            if done:
                self.observed = max(self.observed, number)
            return done

    def pass_by(self, number: int) -> None:
        """Wait on behalf of another stream: the host knows nothing of it, and errors stay for the host."""
        with self._changed:
            while self._finished < number:
                self._changed.wait()

    def wait_until(self, number: int) -> None:
        """Wait on behalf of the host."""
        with self._changed:
            while self._finished < number:
                self._changed.wait()
            self.observed = max(self.observed, number)
            if self._error is not None:
                error, self._error = self._error, None
                raise error

    def synchronize(self) -> None:
        self.wait_until(self._submitted)

    def close(self) -> None:
        """Finish what was launched and stop."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._work and not self._closed:
                    self._changed.wait()
                if not self._work:
                    return
                work, after = self._work.popleft()
            try:
                for fence in after:
                    assert isinstance(fence, SimFence)
                    fence.stream.pass_by(fence.number)
                work()
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
            del work  # and with it the memory that it holds
            with self._changed:
                self._finished += 1
                self._changed.notify_all()
