"""The lanes of a machine as clocks: when a record arrives, and how long compute waits for it."""

from __future__ import annotations

from collections import deque

from cache.hardware import Hardware
from cache.keys import ExpertKey


class Timeline:
    """Disk, link and compute, in seconds since the start.

    A load goes through the disk's lane and then the link's, those that exist; each lane takes one record at a time.
    Demand goes first: a prefetch begins only when its lane has nothing else to do, and is not interrupted once begun.
    """

    def __init__(self, hardware: Hardware, record_bytes: int, layers: int) -> None:
        self.now = 0.0
        self.stall = self.disk_busy = self.link_busy = self.cpu_busy = 0.0
        self._disk_s = record_bytes / hardware.disk_bytes_per_s if hardware.disk_bytes_per_s else None
        self._link_s = record_bytes / hardware.link_bytes_per_s if hardware.link_bytes_per_s else None
        self._load_s = hardware.load_s
        self._expert_s = record_bytes / hardware.expert_bytes_per_s
        self._host_s = record_bytes / hardware.host_bytes_per_s if hardware.host_bytes_per_s else 0.0
        self._event_s, self._dense_s = hardware.event_s, hardware.dense_s / layers
        self._disk_free = self._link_free = 0.0
        self._waiting: deque[tuple[ExpertKey, float]] = (
            deque()
        )  # prefetches that have not begun, and when they were asked
        self._arrival: dict[ExpertKey, float] = {}  # of prefetches that have begun

    def begin_event(self, tokens: int) -> list[ExpertKey]:
        """Compute what comes before the experts; returns the prefetches that have arrived by then."""
        self.now += self._event_s + tokens * self._dense_s
        while self._waiting:
            key, asked = self._waiting[0]
            start = max(asked, self._disk_free if self._disk_s is not None else self._link_free)
            if start > self.now:
                break
            self._waiting.popleft()
            self._arrival[key] = self._load(start)
        arrived = [key for key, at in self._arrival.items() if at <= self.now]
        for key in arrived:
            del self._arrival[key]
        return arrived

    def prefetch(self, key: ExpertKey) -> None:
        """Ask for ``key`` in idle time."""
        self._waiting.append((key, self.now))

    def drop(self, key: ExpertKey) -> bool:
        """Give the prefetch up if it has not begun; tells whether."""
        for item in self._waiting:
            if item[0] == key:
                self._waiting.remove(item)
                return True
        return False

    def finish(self, key: ExpertKey) -> float:
        """When a prefetch arrives that is waited for now; from here on it is the caller's."""
        if self.drop(key):
            return self._load(self.now)
        return self._arrival.pop(key)

    def demand(self, loads: int) -> float:
        """When the last of ``loads`` records arrives that are asked for now."""
        return max((self._load(self.now) for _ in range(loads)), default=self.now)

    def compute(self, experts: int, on_cpu: int = 0) -> None:
        """``experts`` on the device, and ``on_cpu`` beside it where they lie, sharing the RAM's rate with copies."""
        cpu = on_cpu * self._host_s
        if on_cpu:
            copying = min(cpu, max(0.0, self._link_free - self.now))
            cpu += 2 * self._load_s + copying * self._host_s / (self._link_s or 1.0)
        self.now += max(experts * self._expert_s, cpu)
        self.cpu_busy += cpu

    def link_s(self, loads: int) -> float:
        """What so many copies take the link; 0 without one."""
        return 0.0 if self._link_s is None else loads * (self._link_s + (self._load_s if self._disk_s is None else 0.0))

    def chain_s(self, tokens: int, hits: int, misses: int, pending: int, on_cpu: int) -> float:
        """The least time of an event: what comes before its router, then hits beside copies, then what was copied."""
        beside = max(hits * self._expert_s, on_cpu * self._host_s, self.link_s(misses))
        return self._event_s + tokens * self._dense_s + beside + (misses + pending) * self._expert_s

    def wait(self, until: float) -> None:
        if until > self.now:
            self.stall += until - self.now
            self.now = until

    def _load(self, at: float) -> float:
        if self._disk_s is not None:
            self._disk_free = max(self._disk_free, at) + self._disk_s
            self.disk_busy += self._disk_s
            at = self._disk_free + self._load_s
        if self._link_s is not None:
            took = self._link_s + (self._load_s if self._disk_s is None else 0.0)
            self._link_free = max(self._link_free, at) + took
            self.link_busy += took
            at = self._link_free
        return at
