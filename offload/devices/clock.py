"""A virtual clock: when things would have happened on a named machine.

Time passes only where the engine thread says so, in its program order, so the same run takes the same virtual time
whatever the workers of this machine do. There are lanes for the device's kernels, the disk, and each direction of the
link; disk and link serve demand before prefetch, one load at a time, and do not interrupt a load.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cache.machines import Machine


@dataclass(eq=False, slots=True)
class _Job:
    """One load in one lane. ``end`` is None until the lane has started it; ``after`` is its next lane's job."""

    ready_at: float
    duration: float
    prefetch: bool
    after: _Job | None = None
    start: float | None = None
    end: float | None = None


class _Lane:
    def __init__(self) -> None:
        self.free_at = 0.0
        self._queue: list[_Job] = []

    def add(self, job: _Job) -> None:
        self._queue.append(job)

    def remove(self, job: _Job) -> None:
        self._queue.remove(job)

    def next_start(self) -> float | None:
        """When the next job in the queue starts, if nothing else comes."""
        if not self._queue:
            return None
        return max(self.free_at, min(job.ready_at for job in self._queue))

    def busy_until(self) -> float:
        """When it is done with what it has started, and with what waits for nothing else."""
        return self.free_at + sum(job.duration for job in self._queue if job.ready_at <= self.free_at)

    def run(self, until: float) -> list[_Job]:
        """Start every job that starts at ``until`` or before; returns them."""
        started = []
        while (at := self.next_start()) is not None and at <= until:
            there = [job for job in self._queue if job.ready_at <= at]
            job = next((job for job in there if not job.prefetch), there[0])
            self._queue.remove(job)
            job.start, job.end = at, at + job.duration
            self.free_at = job.end
            started.append(job)
        return started


class LoadTiming:
    """A load's virtual way: through the disk lane, the link lane, or both. For the engine thread."""

    def __init__(self, clock: VirtualClock, disk: _Job | None, link: _Job) -> None:
        self._clock = clock
        self._disk = disk
        self._link = link

    def done(self) -> bool:
        """Whether the record has arrived by now."""
        self._clock.advance()
        return self._link.end is not None and self._link.end <= self._clock.now

    def wait(self) -> tuple[float, float]:
        """Let the clock go on to the arrival; returns the seconds that this took, the disk's part and the link's."""
        return self._clock.wait(self._disk, self._link)

    def promote(self) -> None:
        self._clock.advance()
        for job in (self._disk, self._link):
            if job is not None:
                job.prefetch = False

    def drop(self) -> bool:
        """Take it out of its queue if it has not started; tells whether it is out."""
        return self._clock.drop(self._disk, self._link)


class VirtualClock:
    """``now`` is the time of the engine thread; kernels it has launched may be done later. ``launches`` counts them,
    those of a graph as one.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.now = 0.0
        self.kernels_free_at = 0.0
        self.stall_disk = self.stall_link = 0.0
        self._disk, self._up, self._down_free_at = _Lane(), _Lane(), 0.0
        self._in_graph = False
        self.launches = 0

    def launch(self, moved: float, flops: float = 0.0, extra: float = 0.0) -> float:
        """A kernel that moves so many bytes of device memory; returns when it is done."""
        machine = self.machine
        if not self._in_graph:
            self._launched()
        busy = max(moved / machine.expert_bytes_per_s, flops / machine.flops_per_s) + extra
        self.kernels_free_at = max(self.kernels_free_at, self.now) + busy
        return self.kernels_free_at

    @contextmanager
    def graph(self) -> Iterator[None]:
        """The kernels inside are launched together, as one."""
        self._launched()
        self._in_graph = True
        try:
            yield
        finally:
            self._in_graph = False

    def _launched(self) -> None:
        self.launches += 1
        self.now += self.machine.launch_s

    def sync(self) -> None:
        """The engine thread waits for the kernels."""
        self.now = max(self.now, self.kernels_free_at)

    def host(self, seconds: float) -> None:
        """The engine thread computes."""
        self.now += seconds

    def host_expert(self, moved: float, flops: float) -> None:
        """The engine thread computes with weights in host memory, whose rate it shares with copies up."""
        self.advance()
        machine = self.machine
        reading = moved / machine.host_bytes_per_s
        copying = min(reading, max(0.0, self._up.busy_until() - self.now))
        reading += copying * machine.link_bytes_per_s / machine.host_bytes_per_s
        self.now += max(reading, flops / machine.host_flops_per_s)

    def load(self, disk_bytes: int, link_bytes: int, prefetch: bool, after: float) -> LoadTiming:
        """A load that is asked for now; its copy starts at ``after`` at the earliest."""
        self.advance()
        machine = self.machine
        link = _Job(max(self.now, after), link_bytes / machine.link_bytes_per_s + machine.load_s, prefetch)
        disk = None
        if disk_bytes:
            disk = _Job(self.now, disk_bytes / machine.disk_bytes_per_s + machine.load_s, prefetch, link)
            self._disk.add(disk)
        else:
            self._up.add(link)
        return LoadTiming(self, disk, link)

    def download(self, size: int, after: float) -> float:
        """A copy to the host; returns when it is done."""
        machine = self.machine
        self._down_free_at = max(self._down_free_at, self.now, after) + size / machine.link_bytes_per_s + machine.load_s
        return self._down_free_at

    def advance(self, until: float | None = None) -> None:
        """Bring the lanes up to ``until`` (default: now): what has started by then cannot be overtaken any more."""
        until = self.now if until is None else until
        for job in self._disk.run(until):
            if job.after is not None:
                assert job.end is not None
                job.after.ready_at = max(job.after.ready_at, job.end)
                self._up.add(job.after)
        self._up.run(until)

    def wait(self, disk: _Job | None, link: _Job) -> tuple[float, float]:
        while link.end is None:
            starts = [at for lane in (self._disk, self._up) if (at := lane.next_start()) is not None]
            self.advance(min(starts))
        began = self.now
        read = began if disk is None or disk.end is None else max(began, disk.end)
        self.now = max(began, link.end)
        stalls = read - began, self.now - max(began, min(read, self.now))
        self.stall_disk += stalls[0]
        self.stall_link += stalls[1]
        return stalls

    def drop(self, disk: _Job | None, link: _Job) -> bool:
        self.advance()
        first, lane = (disk, self._disk) if disk is not None else (link, self._up)
        if first.start is not None:
            return False
        lane.remove(first)
        return True
