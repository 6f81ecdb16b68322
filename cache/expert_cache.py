"""Which expert is in which slot: the only owner of "what is where"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from cache.keys import ExpertKey
from cache.policies.base import Policy


class SlotState(Enum):
    EMPTY = "empty"
    LOADING = "loading"
    READY = "ready"


class Lookup(NamedTuple):
    """One event, classified as a whole before anything is admitted. Each part is in the order of the request."""

    hits: list[ExpertKey]
    pending: list[ExpertKey]
    misses: list[ExpertKey]


class Reservation(NamedTuple):
    """``key`` shall be loaded into ``slot``; ``victim`` was there before and is gone."""

    key: ExpertKey
    slot: int
    victim: ExpertKey | None


@dataclass(slots=True)
class Counters:
    """Accesses by outcome; one access is one distinct expert of one event."""

    hits: int = 0
    pending: int = 0
    misses: int = 0

    @property
    def accesses(self) -> int:
        return self.hits + self.pending + self.misses

    @property
    def hit_rate(self) -> float | None:
        """Share of accesses that were hits (a pending is not one), or None before the first access."""
        return self.hits / self.accesses if self.accesses else None


@dataclass(slots=True)
class CacheCounters:
    prefill: Counters = field(default_factory=Counters)
    decode: Counters = field(default_factory=Counters)
    evictions: int = 0
    failed_loads: int = 0


class ExpertCache:
    """Slots, their states, and the event that is being served. Holds no weights; not thread-safe by design.

    One event goes like this, always on the engine thread::

        found = cache.lookup(layer, experts)           # classify; all of the event's keys are protected from now on
        loads = cache.reserve(found.misses)            # slots for as many misses as fit; the victims are gone
        cache.commit(key) or cache.abandon(key)        # for each load
        cache.release(key)                             # computed: its slot may go to another key of this event
        cache.end_event()

    A slot that is loading, or whose key the open event still needs, is never a victim. Victims come from outside the
    event first, and from its released keys only when nothing else is left, so an event larger than the cache streams
    through whatever slots there are; one is enough.
    """

    def __init__(self, slots: int, policy: Policy) -> None:
        if slots < 1:
            raise ValueError("an expert cache needs at least one slot")
        self.policy = policy
        self.counters = CacheCounters()
        self._key: list[ExpertKey | None] = [None] * slots
        self._state = [SlotState.EMPTY] * slots
        self._slot: dict[ExpertKey, int] = {}
        self._free = list(range(slots - 1, -1, -1))  # taken from the end: slot 0 first
        self._loading: set[ExpertKey] = set()
        self._event: frozenset[ExpertKey] = frozenset()
        self._needed: set[ExpertKey] = set()  # keys of the open event that were not released

    @property
    def slots(self) -> int:
        return len(self._key)

    def state(self, key: ExpertKey) -> SlotState:
        """EMPTY means: not resident."""
        slot = self._slot.get(key)
        return SlotState.EMPTY if slot is None else self._state[slot]

    def slot(self, key: ExpertKey) -> int:
        """The slot of a resident key. Raises KeyError if it has none."""
        return self._slot[key]

    def resident(self) -> set[ExpertKey]:
        """Keys that hold a slot, loading ones included."""
        return set(self._slot)

    def occupancy(self) -> list[tuple[ExpertKey, SlotState]]:
        """The resident keys with their states. The one method that other threads may call: the copies are made in one
        step each, so that a key may show the state of a moment before, but nothing is torn."""
        keys, states = self._key[:], self._state[:]
        return [(key, state) for key, state in zip(keys, states, strict=True) if key is not None]

    def lookup(self, layer: int, experts: Iterable[int], *, decode: bool = True) -> Lookup:
        """Open an event: classify all of its experts at once, count them and tell the policy.

        Raises RuntimeError if the event before was not ended.
        """
        if self._event:
            raise RuntimeError("lookup: the event before was not ended")
        keys = [ExpertKey(layer, expert) for expert in dict.fromkeys(experts)]
        found = Lookup([], [], [])
        by_state = {SlotState.READY: found.hits, SlotState.LOADING: found.pending, SlotState.EMPTY: found.misses}
        for key in keys:
            by_state[self.state(key)].append(key)
        counters = self.counters.decode if decode else self.counters.prefill
        counters.hits += len(found.hits)
        counters.pending += len(found.pending)
        counters.misses += len(found.misses)
        self._event = frozenset(keys)
        self._needed = set(keys)
        self.policy.record_event(keys)
        return found

    def reserve(self, keys: Sequence[ExpertKey], limit: int | None = None) -> list[Reservation]:
        """Give slots to the first of ``keys``, as many as can be had now (and at most ``limit``); maybe none.

        The reserved keys are loading afterwards, and the victims are no longer resident. Raises ValueError if a key
        is resident already.
        """
        for key in keys:
            if key in self._slot:
                raise ValueError(f"reserve: {key} is resident already")
        wanted = len(keys) if limit is None else min(limit, len(keys))
        victims = self._choose_victims(wanted - len(self._free))
        return self._take_slots(keys[: min(wanted, len(self._free) + len(victims))], victims)

    def reserve_ahead(self, keys: Sequence[ExpertKey]) -> list[Reservation]:
        """Give slots to some of ``keys``, first ones first, for loads on a prediction: maybe none.

        Resident keys are passed over. At most a quarter of the slots is ever loading after this, so that demand finds
        slots; what goes is what the policy calls cold, outside the open event and outside ``keys``.
        """
        missing = [key for key in keys if key not in self._slot]
        room = max(0, len(self._key) // 4 - len(self._loading))
        wanted = missing[:room]
        blocked = self._event | self._loading | set(keys)
        victims = self.policy.cold(len(wanted) - len(self._free), blocked)
        return self._take_slots(wanted[: len(self._free) + len(victims)], victims)

    def commit(self, key: ExpertKey) -> None:
        """The load of ``key`` is done. Raises ValueError if it was not loading."""
        self._finish_loading(key)
        self._state[self._slot[key]] = SlotState.READY

    def abandon(self, key: ExpertKey) -> None:
        """The load of ``key`` failed or is not wanted: its slot is empty again. Raises ValueError if not loading."""
        self._finish_loading(key)
        self.counters.failed_loads += 1
        self._vacate(key)

    def release(self, key: ExpertKey) -> None:
        """The open event has used ``key``. Raises ValueError if the event does not hold it (any more)."""
        if key not in self._needed:
            raise ValueError(f"release: the open event does not hold {key}")
        self._needed.remove(key)

    def end_event(self) -> None:
        """Close the event; nothing is protected on its account any more. Loads in flight stay loading."""
        self._event = frozenset()
        self._needed.clear()

    def check_integrity(self) -> None:
        """Assert every invariant of the state machine. For tests; O(slots)."""
        held = {key: slot for slot, key in enumerate(self._key) if key is not None}
        assert held == self._slot, "keys and slots name each other"
        assert len(self._free) == len(set(self._free)), "a free slot is free once"
        for slot, (key, state) in enumerate(zip(self._key, self._state, strict=True)):
            assert (state is SlotState.EMPTY) == (key is None) == (slot in self._free), f"slot {slot} is consistent"
        loading = {key for key, slot in self._slot.items() if self._state[slot] is SlotState.LOADING}
        assert loading == self._loading, "the loading set matches the slot states"
        assert self._needed <= self._event, "only keys of the open event are needed"
        assert self.policy.resident() == set(self._slot), "the policy knows exactly the resident keys"
        self.policy.check_integrity()

    def _choose_victims(self, n: int) -> list[ExpertKey]:
        """At most ``n`` keys to give up: outside the event first, then its released keys."""
        if n <= 0:
            return []
        chosen: list[ExpertKey] = []
        for protected in (self._event | self._loading, self._needed | self._loading):
            blocked = protected | set(chosen)
            available = len(self._slot) - sum(key in self._slot for key in blocked)
            count = min(n - len(chosen), available)
            more = self.policy.victims(count, blocked)
            assert more is not None, "the policy has fewer victims than the cache"
            chosen += more
            if len(chosen) == n:
                break
        return chosen

    def _take_slots(self, keys: Sequence[ExpertKey], victims: list[ExpertKey]) -> list[Reservation]:
        """Free slots first, then those of ``victims``; there are enough of both for all of ``keys``."""
        reservations = []
        for key in keys:
            victim = None
            if not self._free:
                victim = victims.pop(0)
                self._vacate(victim)
                self.counters.evictions += 1
            slot = self._free.pop()
            self._key[slot], self._state[slot], self._slot[key] = key, SlotState.LOADING, slot
            self._loading.add(key)
            self.policy.admit(key)
            reservations.append(Reservation(key, slot, victim))
        return reservations

    def _finish_loading(self, key: ExpertKey) -> None:
        if key not in self._loading:
            raise ValueError(f"{key} is not loading")
        self._loading.remove(key)

    def _vacate(self, key: ExpertKey) -> None:
        slot = self._slot.pop(key)
        self._key[slot], self._state[slot] = None, SlotState.EMPTY
        self._free.append(slot)
        self.policy.evict(key)
