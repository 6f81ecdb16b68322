"""Transfer lanes: loads in flight, and the tickets to wait on."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

from cache.keys import ExpertKey
from offload.checkpoint.expert_file import ExpertFile


class Ticket:
    """One load on its way. The error of a failed load comes out of :meth:`wait`."""

    def __init__(self, key: ExpertKey, future: Future[int]) -> None:
        self.key = key
        self._future = future

    def ready(self) -> bool:
        """Whether :meth:`wait` would return (or raise) at once."""
        return self._future.done()

    def wait(self) -> tuple[int, float]:
        """Wait for the load; returns its bytes and the seconds that this call waited. Raises the load's error."""
        started = time.perf_counter()
        size = self._future.result()
        return size, time.perf_counter() - started

    def settle(self) -> bool:
        """Wait until nothing writes to the slot any more; True if the record arrived whole. Raises nothing."""
        return not self._future.cancel() and self._future.exception() is None


class DiskLane:
    """Disk -> slot. A few workers, since a single reader leaves an NVMe disk half idle."""

    def __init__(self, file: ExpertFile, workers: int) -> None:
        self._file = file
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="disk-lane")

    def load(self, key: ExpertKey, buffer: memoryview) -> Ticket:
        """Start reading the record of ``key`` into ``buffer``, which must not be touched until the ticket is done."""
        return Ticket(key, self._pool.submit(self._file.read_into, key, buffer))

    def close(self) -> None:
        """Stop: loads that have not started are dropped, running ones are waited for."""
        self._pool.shutdown(wait=True, cancel_futures=True)
