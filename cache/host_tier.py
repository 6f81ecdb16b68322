"""The second tier: which records lie in host memory, behind the device's slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cache.keys import ExpertKey
from cache.policies.base import Policy


class HostReservation(NamedTuple):
    """``key`` shall go to the buffer ``slot``; ``victim`` was there before and is gone."""

    key: ExpertKey
    slot: int
    victim: ExpertKey | None


@dataclass(slots=True)
class HostCounters:
    """Of the records that the device lacked: how many lay here, and how many came from disk. ``demoted`` fell here from
    the device without a read."""

    hits: int = 0
    misses: int = 0
    demoted: int = 0
    evictions: int = 0

    @property
    def hit_rate(self) -> float | None:
        looked = self.hits + self.misses
        return self.hits / looked if looked else None


class HostTier:
    """Buffers, what is in them, and what must stay because a load is under way. Not thread-safe by design.

    A load of the device asks with :meth:`find`. A record that comes from disk takes a buffer with :meth:`reserve`, and
    :meth:`commit` or :meth:`abandon` ends that. :meth:`pin` keeps a record while the device copies it. There may be no
    buffers at all: then nothing is ever found and nothing can be reserved.
    """

    def __init__(self, slots: int, policy: Policy) -> None:
        self.policy = policy
        self.counters = HostCounters()
        self._slot: dict[ExpertKey, int] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._slots = slots
        self._loading: set[ExpertKey] = set()
        self._pins: dict[ExpertKey, int] = {}

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def used(self) -> int:
        return len(self._slot)

    def resident(self) -> set[ExpertKey]:
        """Keys that hold a buffer, loading ones included."""
        return set(self._slot)

    def record_event(self, keys: Sequence[ExpertKey]) -> None:
        """An event, or what of it the device lacks."""
        self.policy.record_event(keys)

    def change_policy(self, policy: Policy) -> None:
        """Go on with a fresh ``policy``: it is told of the records here, the coldest of the old one first."""
        for key in self.policy.victims(len(self._slot), ()) or ():
            policy.admit(key)
        self.policy = policy

    def find(self, key: ExpertKey) -> int | None:
        """The buffer that holds the whole record of ``key``, or None."""
        return None if key in self._loading else self._slot.get(key)

    def pin(self, key: ExpertKey) -> None:
        """Keep the record where it is until :meth:`unpin`. Raises KeyError if it is not here."""
        if key not in self._slot:
            raise KeyError(key)
        self._pins[key] = self._pins.get(key, 0) + 1

    def unpin(self, key: ExpertKey) -> None:
        """Raises KeyError if it was not pinned."""
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]

    def reserve(self, key: ExpertKey) -> HostReservation | None:
        """A buffer for a record that is not here, loading afterwards; None if all others must stay."""
        if key in self._slot:
            raise ValueError(f"reserve: {key} is here already")
        victim = None
        if not self._free:
            found = self.policy.victims(1, self._loading | self._pins.keys()) if self._slot else None
            if not found:
                return None
            victim = found[0]
            self._vacate(victim)
            self.counters.evictions += 1
        slot = self._free.pop()
        self._slot[key] = slot
        self._loading.add(key)
        self.policy.admit(key)
        return HostReservation(key, slot, victim)

    def demote(self, key: ExpertKey) -> HostReservation | None:
        """A buffer for a record that the device gives up, whole at once; None if it is colder than all that is here."""
        reserved = None
        if key not in self._slot and self._slots:
            if not self._free:  # let the policy compare it with the others
                self.policy.admit(key)
                coldest = self.policy.victims(1, self._loading | self._pins.keys())
                self.policy.evict(key)
                if not coldest or coldest[0] == key:
                    return None
            reserved = self.reserve(key)
            if reserved is not None:
                self._loading.remove(key)
                self.counters.demoted += 1
        return reserved

    def commit(self, key: ExpertKey) -> None:
        """The record is here. Raises KeyError if it was not loading."""
        self._loading.remove(key)

    def abandon(self, key: ExpertKey) -> None:
        """It will not come. Raises KeyError if it was not loading."""
        self._loading.remove(key)
        self._vacate(key)

    def drop(self, key: ExpertKey) -> None:
        """Give up a record that is whole and not pinned. Raises ValueError if it is not."""
        if key in self._loading or key in self._pins or key not in self._slot:
            raise ValueError(f"drop: {key} is not here, or must stay")
        self._vacate(key)

    def shrink(self, slots: int) -> list[int]:
        """Have at most ``slots`` buffers, or as few as loads under way allow; returns the buffers given up."""
        gone = []
        while self._slots > slots:
            if not self._free:
                found = self.policy.victims(1, self._loading | self._pins.keys())
                if not found:
                    break
                self._vacate(found[0])
                self.counters.evictions += 1
            gone.append(self._free.pop())
            self._slots -= 1
        return gone

    def grow(self, buffers: Sequence[int]) -> None:
        """Have these buffers, too; none of them may be one that is had already."""
        self._free += buffers
        self._slots += len(buffers)

    def check_integrity(self) -> None:
        """Assert every invariant. For tests."""
        taken = list(self._slot.values())
        assert len(set(taken)) == len(taken), "a buffer has one record"
        assert not set(taken) & set(self._free), "a free buffer has none"
        assert len(taken) + len(self._free) == self._slots, "no buffer is lost"
        assert self._loading <= self._slot.keys(), "what is loading has a buffer"
        assert self._pins.keys() <= self._slot.keys() and all(n > 0 for n in self._pins.values()), "pins are of records"
        assert self.policy.resident() == set(self._slot), "the policy knows exactly the resident keys"
        self.policy.check_integrity()

    def _vacate(self, key: ExpertKey) -> None:
        self._free.append(self._slot.pop(key))
        self.policy.evict(key)
