"""Which record is in which slot, and what is on its way: the tables beneath the expert cache."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from cache.keys import ExpertKey, KeyTable
from cache.outcomes import CacheCounters, Reservation, SlotState
from cache.policies.base import Policy


class SlotTable:
    """Slots with their keys. Tells the policy of every key that takes or loses one; chooses nothing by itself."""

    def __init__(self, slots: int, policy: Policy) -> None:
        if slots < 1:
            raise ValueError("an expert cache needs at least one slot")
        self.policy = policy
        self.counters = CacheCounters()
        self._key: list[ExpertKey | None] = [None] * slots
        self._slot: dict[ExpertKey, int] = {}
        self._free = list(range(slots - 1, -1, -1))  # taken from the end: slot 0 first
        self._loading: set[ExpertKey] = set()
        self.keys = KeyTable().of
        """``keys(layer, experts)``: the keys of ``experts`` of ``layer``, the same objects every time."""
        self._held: defaultdict[int, int] = defaultdict(int)  # slots that each layer has
        self._passing: dict[ExpertKey, None] = {}  # records at the cold end, the oldest first
        self._retired: set[int] = set()  # numbers of slots that have no memory

    @property
    def slots(self) -> int:
        return len(self._key) - len(self._retired)

    def state(self, key: ExpertKey) -> SlotState:
        """EMPTY means: not resident."""
        if key not in self._slot:
            return SlotState.EMPTY
        return SlotState.LOADING if key in self._loading else SlotState.READY

    def slot(self, key: ExpertKey) -> int:
        """The slot of a resident key. Raises KeyError if it has none."""
        return self._slot[key]

    def resident(self) -> set[ExpertKey]:
        """Keys that hold a slot, loading ones included."""
        return set(self._slot)

    def occupancy(self) -> list[tuple[ExpertKey, SlotState]]:
        """The resident keys with their states. The one method that other threads may call: the copies are made in one
        step each, so that a key may show the state of a moment before, but nothing is torn."""
        keys, loading = self._key[:], self._loading.copy()
        return [(key, SlotState.LOADING if key in loading else SlotState.READY) for key in keys if key is not None]

    def check_integrity(self) -> None:
        """Assert that the tables agree with each other. O(slots)."""
        held = {key: slot for slot, key in enumerate(self._key) if key is not None}
        assert held == self._slot, "keys and slots name each other"
        assert len(self._free) == len(set(self._free)), "a free slot is free once"
        for slot, key in enumerate(self._key):
            empty = slot in self._free or slot in self._retired
            assert (key is None) == empty, f"slot {slot} is consistent"
        assert self._retired.isdisjoint(self._free), "a retired slot is not free"
        assert self._loading <= self._slot.keys(), "what is loading has a slot"
        assert self.policy.resident() == set(self._slot), "the policy knows exactly the resident keys"
        by_layer = Counter(key.layer for key in self._slot)
        assert by_layer == Counter(self._held), "the slots of each layer are counted"
        self.policy.check_integrity()

    def _take_slots(self, keys: Sequence[ExpertKey], free: int, victims: list[ExpertKey]) -> list[Reservation]:
        """The first ``free`` keys take free slots, the others those of ``victims``, one for each."""
        for victim in victims:  # all go before the first comes, so that a policy sees one search carried out
            self._vacate(victim)
        self.counters.evictions += len(victims)
        slots = self._free[len(self._free) - len(keys) :]
        del self._free[len(self._free) - len(keys) :]
        slots = slots[: len(slots) - len(victims)][::-1] + slots[len(slots) - len(victims) :]
        reservations = []
        for number, (key, slot) in enumerate(zip(keys, slots, strict=True)):
            self._key[slot] = key
            self._slot[key] = slot
            self._held[key.layer] += 1
            self._loading.add(key)
            self.policy.admit(key)
            reservations.append(Reservation(key, slot, victims[number - free] if number >= free else None))
        return reservations

    def _finish_loading(self, key: ExpertKey) -> None:
        if key not in self._loading:
            raise ValueError(f"{key} is not loading")
        self._loading.remove(key)

    def _vacate(self, key: ExpertKey) -> None:
        slot = self._slot.pop(key)
        self._key[slot] = None
        self._held[key.layer] -= 1
        self._free.append(slot)
        self._passing.pop(key, None)
        self.policy.evict(key)
