"""Which expert is in which slot: the only owner of "what is where"."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile

from cache.keys import ExpertKey
from cache.outcomes import CacheCounters, Counters, Lookup, Reservation, SlotState
from cache.policies.base import Policy
from cache.shares import layer_shares, passing_slots
from cache.slot_table import SlotTable

__all__ = ["CacheCounters", "Counters", "ExpertCache", "Lookup", "Reservation", "SlotState"]


class ExpertCache(SlotTable):
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

    With ``layers`` (scope ``layer``) each layer has an even share of the slots and finds its victims among its own
    keys. A layer below its share gets a free slot, or else one of the layer that is furthest above its own: after a
    change of scope, or where there are fewer slots than layers and an event needs one all the same.

    A forward pass of many tokens (a prompt, the rows of a batch) may need most records of every layer, one layer after
    the other. Admitted like any others, each layer's would push out what the next layers are about to use, and the pass
    would find nothing. So its events stream (``recent`` of :meth:`lookup`): beyond ``fill`` slots for each layer, while
    there are free ones, records go through a few slots at the cold end, which any later event takes first: how many
    follows from ``records``, the number of all experts. Only what the most recent tokens use stays, in place of records
    of the same layer that the pass does not need. What the next event of such a pass will take can be loaded before it
    (:meth:`reserve_next`).
    """

    def __init__(
        self,
        slots: int,
        policy: Policy,
        layers: Iterable[int] | None = None,
        fill: int | None = None,
        records: int | None = None,
    ) -> None:
        super().__init__(slots, policy)
        self._event: frozenset[ExpertKey] = frozenset()  # keys of the open one
        self._needed: set[ExpertKey] = set()  # keys of the open event that were not released
        self._share = None if layers is None else layer_shares(slots, layers)
        self._fill = slots if fill is None else fill
        self._most_passing = passing_slots(slots, records)
        self._recent: frozenset[ExpertKey] | None = None  # of the open event, if it streams
        self._foretold: set[ExpertKey] = set()  # loaded ahead, and their layer's event has not come yet

    def has_free_slot(self, layer: int) -> bool:
        """Whether a key of ``layer`` could be admitted now without a victim."""
        return self._free_for(layer) > 0

    def change_policy(self, policy: Policy, layers: Iterable[int] | None = None) -> None:
        """Go on with a fresh ``policy``, under the scope ``layer`` with ``layers``, else ``global``; residents stay.

        The policy is told of them as if they had just been admitted, the coldest of the old policy first. Raises
        RuntimeError if an event is open.
        """
        if self._event:
            raise RuntimeError("change_policy: an event is open")
        for key in self.policy.victims(len(self._slot), ()) or ():
            policy.admit(key)
        self.policy = policy
        self._share = None if layers is None else layer_shares(self.slots, layers)

    def lookup(
        self,
        layer: int,
        experts: Iterable[int],
        *,
        decode: bool = True,
        recent: Sequence[Sequence[int]] | None = None,
    ) -> Lookup:
        """Open an event: classify all of its experts at once, count them and tell the policy.

        With ``recent`` the event streams, and the policy is told of these groups of its experts alone, one after the
        other: those of the last tokens of a prompt, say.

        Raises RuntimeError if the event before was not ended.
        """
        if self._event:
            raise RuntimeError("lookup: the event before was not ended")
        keys = self.keys(layer, dict.fromkeys(experts))
        if self._foretold:
            self._foretold = {key for key in self._foretold if key.layer != layer}
        found = Lookup([], [], [])
        for key in keys:
            if key not in self._slot:
                found.misses.append(key)
            elif key in self._loading:
                found.pending.append(key)
            else:
                found.hits.append(key)
        counters = self.counters.decode if decode else self.counters.prefill
        counters.hits += len(found.hits)
        counters.pending += len(found.pending)
        counters.misses += len(found.misses)
        self._event = frozenset(keys)
        self._needed = set(keys)
        if recent is None:
            self.policy.record_event(keys)
            for key in found.hits if self._passing else ():
                self._passing.pop(key, None)
            return found
        groups = [self.keys(layer, group) for group in recent]
        for group in groups:
            self.policy.record_event(group)
        self._recent = frozenset().union(*groups)
        if self._passing and found.pending:
            self._keep_foretold(found.pending, layer, self._recent)
        return found

    def reserve(self, keys: Sequence[ExpertKey], limit: int | None = None) -> list[Reservation]:
        """Give slots to the first of ``keys``, as many as can be had now (and at most ``limit``); maybe none.

        ``keys`` are of one layer. The reserved keys are loading afterwards, and the victims are no longer resident.
        Raises ValueError if a key is resident already.
        """
        for key in keys:
            if key in self._slot:
                raise ValueError(f"reserve: {key} is resident already")
        wanted = len(keys) if limit is None else min(limit, len(keys))
        if wanted <= 0:
            return []
        layer = keys[0].layer
        if self._recent is not None and self._share is None:
            return self._reserve_streaming(keys[:wanted], layer, self._recent)
        free = min(wanted, self._free_for(layer))
        victims = self._choose_victims(wanted - free, layer) if free < wanted else []
        return self._take_slots(keys[: free + len(victims)], free, victims)

    def reserve_ahead(
        self, keys: Sequence[ExpertKey], repays: Callable[[ExpertKey, ExpertKey], bool] | None = None
    ) -> list[Reservation]:
        """Give slots to some of ``keys``, first ones first, for loads that no event waits for: maybe none.

        ``keys`` are of one layer; resident ones are passed over. At most a quarter of the slots (under the scope
        ``layer``: of the layer's share) is ever loading after this, so that demand finds slots; what goes is what the
        policy calls cold, outside the open event and outside ``keys``, and, with ``repays(key, victim)``, only if so.
        Without ``repays`` the keys are foretold: until their layer's next event they go only when nothing else is left.
        """
        missing = [key for key in keys if key not in self._slot]
        if not missing:
            return []
        layer = missing[0].layer
        if self._share is None:
            room, scope = self.slots // 4 - len(self._loading), None
        else:
            room, scope = self._share[layer] // 4 - sum(key.layer == layer for key in self._loading), layer
        wanted, victims = missing[: max(0, room)], []
        free = min(len(wanted), self._free_for(layer))
        if free < len(wanted):
            blocked = {*self._event, *self._loading, *self._foretold, *keys}
            victims = self.policy.cold(len(wanted) - free, blocked, scope)
            if repays is not None:
                pairs = takewhile(lambda pair: repays(*pair), zip(wanted[free:], victims, strict=False))
                victims = [victim for _, victim in pairs]
        if repays is None:
            self._foretold.update(wanted[: free + len(victims)])
        return self._take_slots(wanted[: free + len(victims)], free, victims)

    def reserve_next(self, keys: Sequence[ExpertKey]) -> list[Reservation]:
        """Give slots to the first of ``keys``, which the next event of a pass that streams will take; maybe none.

        ``keys`` are of one layer and not resident. They get what that event would take first: free slots of the layer's
        share, then those at the cold end, once nothing in them is loading or needed by the open event. Nothing else
        goes, unless the cold end has fewer slots than it may have; under the scope ``layer`` only free slots are given.
        No more records than there are slots at the cold end are ever on their way for events to come. Raises ValueError
        if a key is resident already.
        """
        room = self._most_passing - len(self._loading.difference(self._event))
        if room <= 0 or not keys:
            return []
        for key in keys:
            if key in self._slot:
                raise ValueError(f"reserve_next: {key} is resident already")
        layer = keys[0].layer
        if self._share is not None:
            free = min(room, len(keys), self._free_for(layer))
            return self._take_slots(keys[:free], free, [])
        free = max(0, min(room, len(keys), len(self._free), self._fill - self._held[layer]))
        kept = self._loading | self._needed
        victims = [key for key in self._passing if key not in kept and key.layer != layer]
        wanted = min(room, len(keys)) - free
        del victims[wanted:]
        if (grow := min(wanted - len(victims), self._most_passing - len(self._passing))) > 0:
            blocked = self._occupied().union(key for key in self._slot if key.layer == layer)
            available = len(self._slot) - sum(key in self._slot for key in blocked)
            victims += self.policy.victims(min(grow, available), blocked) or []
        taken = self._take_slots(keys[: free + len(victims)], free, victims)
        self._passing.update((load.key, None) for load in taken[free:])
        return taken

    def commit(self, key: ExpertKey) -> None:
        """The load of ``key`` is done. Raises ValueError if it was not loading."""
        self._finish_loading(key)

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

    def makes_room(self, key: ExpertKey) -> bool:
        """Whether a key of the open event may get a slot because ``key``, a hit, is released, before all are.

        Others may be released whenever it suits: no victim depends on it.
        """
        return self._recent is None or self._share is not None or key in self._passing

    def end_event(self) -> None:
        """Close the event; nothing is protected on its account any more. Loads in flight stay loading."""
        self._event = frozenset()
        self._needed = set()
        self._recent = None

    def retire(self, wanted: int, segment: int = 1) -> list[int]:
        """Give up about ``wanted`` slots between two events; returns their numbers.

        Slots go by whole segments of ``segment``, those whose records the policy misses least; at least one segment
        stays. Raises RuntimeError if an event is open or a record is loading.
        """
        if self._event or self._loading:
            raise RuntimeError("retire: an event is open or a record is loading")
        cold = self.policy.victims(len(self._slot), ()) or []
        warmth = {key: place for place, key in enumerate(cold, 1)}
        segments: defaultdict[int, int] = defaultdict(int)
        members: defaultdict[int, list[int]] = defaultdict(list)
        for slot, key in enumerate(self._key):
            if slot not in self._retired:
                segments[slot // segment] += 0 if key is None else warmth[key]
                members[slot // segment].append(slot)
        order = sorted(segments, key=lambda number: (segments[number], -number))
        gone: list[int] = []
        for number in order[:-1]:
            if len(gone) >= wanted:
                break
            gone += members[number]
        for slot in gone:
            if (resident := self._key[slot]) is not None:
                self._vacate(resident)
                self.counters.evictions += 1
        self._retired.update(gone)
        self._free = [slot for slot in self._free if slot not in self._retired]
        self._share_out()
        return gone

    def grow(self, slots: Iterable[int]) -> None:
        """Take slots of these numbers into use, retired ones or new ones. Raises ValueError for one in use."""
        for slot in slots:
            if slot < len(self._key) and slot not in self._retired:
                raise ValueError(f"grow: slot {slot} is in use")
            while slot >= len(self._key):
                self._retired.add(len(self._key))
                self._key.append(None)
            self._retired.remove(slot)
            self._free.append(slot)
        self._share_out()

    def _share_out(self) -> None:
        if self._share is not None:
            self._share = layer_shares(self.slots, self._share)

    def clear(self) -> None:
        """Empty all slots between two events; what the policy has learned stays. Raises RuntimeError within one."""
        if self._event or self._loading:
            raise RuntimeError("clear: an event is open or a record is loading")
        for key in list(self._slot):
            self._vacate(key)

    def check_integrity(self) -> None:
        """Assert every invariant of the state machine. For tests; O(slots)."""
        super().check_integrity()
        assert self._passing.keys() <= self._slot.keys(), "what passes through has a slot"
        assert self._foretold <= self._slot.keys(), "what was loaded ahead has a slot"
        assert self._needed <= self._event, "only keys of the open event are needed"

    def _free_for(self, layer: int) -> int:
        """Free slots that ``layer`` may take."""
        if self._share is None:
            return len(self._free)
        return max(0, min(len(self._free), max(1, self._share[layer]) - self._held[layer]))

    def _choose_victims(self, n: int, layer: int) -> list[ExpertKey]:
        """At most ``n`` keys to give up for keys of ``layer``: outside the event first, then its released keys."""
        if self._share is None:
            passing = self._passing_outside()[:n]
            return passing + self._victims_among(n - len(passing), None, passing)
        below = max(1, self._share[layer]) - self._held[layer]
        chosen: list[ExpertKey] = []
        if below > len(self._free):  # it may grow, but somebody else has the slots
            chosen = self._victims_of_others(min(n, below - len(self._free)), layer)
        return chosen + self._victims_among(n - len(chosen), layer)

    def _victims_among(self, n: int, layer: int | None, but: Sequence[ExpertKey] = ()) -> list[ExpertKey]:
        """At most ``n`` keys of ``layer`` (None: all) outside ``but``, the event's last, and of those the released."""
        chosen: list[ExpertKey] = []
        for kept in ([*self._event, *self._foretold], self._event, self._needed):
            if len(chosen) == n:
                break
            blocked = {*kept, *self._loading, *chosen, *but}
            if layer is None:
                available = len(self._slot) - sum(key in self._slot for key in blocked)
            else:
                available = self._held[layer] - sum(key.layer == layer and key in self._slot for key in blocked)
            more = self.policy.victims(min(n - len(chosen), available), blocked, layer)
            assert more is not None, "the policy has fewer victims than the cache"
            chosen += more
        return chosen

    def _passing_outside(self) -> list[ExpertKey]:
        """Records at the cold end that neither the event nor a load holds."""
        if not self._passing:
            return []
        return [key for key in self._passing if key not in self._event and key not in self._loading]

    def _reserve_streaming(
        self, keys: Sequence[ExpertKey], layer: int, recent: frozenset[ExpertKey]
    ) -> list[Reservation]:
        """:meth:`reserve` in an event that streams."""
        to_fill = max(0, min(len(self._free), self._fill - self._held[layer]))
        free = len(self._free) - to_fill
        wanted = sum(key in recent for key in keys)
        idle = self._idle_of(layer, wanted) if wanted else []
        outside = self._passing_outside()
        done = [key for key in self._passing if key in self._event and key not in self._needed]
        grow = self._most_passing - len(self._passing)
        filled: list[ExpertKey] = []
        passing: list[ExpertKey] = []
        staying: list[ExpertKey] = []
        victims: list[ExpertKey] = []
        for key in keys:
            if to_fill:
                to_fill -= 1
                filled.append(key)
            elif key in recent and idle:
                victims.append(idle.pop(0))
                staying.append(key)
            elif outside:
                victims.append(outside.pop(0))
                passing.append(key)
            elif grow > 0 and free:
                free -= 1
                grow -= 1
                filled.append(key)
                self._passing[key] = None
            elif grow > 0 and (more := self._coldest_outside({*self._occupied(), *idle, *victims})):
                grow -= 1
                victims.append(more)
                passing.append(key)
            elif done:
                victims.append(done.pop(0))
                passing.append(key)
            else:
                break
        # only when all is computed, not when all has arrived: victims must not depend on when reads end
        if not victims and not filled and not any(key in self._slot for key in self._needed):
            victims = self._victims_among(1, None)
            staying = list(keys[: len(victims)])
        order = sorted((*staying, *passing), key=keys.index)  # that of their victims
        taken = self._take_slots([*filled, *order], len(filled), victims)
        self._passing.update(dict.fromkeys(passing))
        return taken

    def _occupied(self) -> set[ExpertKey]:
        """Keys that the open event, a load or the cold end holds."""
        return {*self._event, *self._loading, *self._passing}

    def _idle_of(self, layer: int, most: int) -> list[ExpertKey]:
        """At most so many records of ``layer`` that nothing occupies, the coldest first."""
        blocked = self._occupied()
        others = self._held[layer] - sum(key.layer == layer and key in self._slot for key in blocked)
        return (self.policy.victims(min(most, others), blocked, layer) or []) if others > 0 else []

    def _keep_foretold(self, pending: Sequence[ExpertKey], layer: int, recent: frozenset[ExpertKey]) -> None:
        """What came in at the cold end and is of recent use changes places with idle records of the layer, which a miss
        would have displaced: they are at the cold end now."""
        keys = [key for key in pending if key in self._passing and key in recent]
        for key, idle in zip(keys, self._idle_of(layer, len(keys)), strict=False):
            del self._passing[key]
            self._passing[idle] = None

    def _coldest_outside(self, blocked: set[ExpertKey]) -> ExpertKey | None:
        found = self.policy.victims(1, blocked)
        return found[0] if found else None

    def _victims_of_others(self, n: int, layer: int) -> list[ExpertKey]:
        """At most ``n`` keys, each of the layer that is then furthest above its share, the lowest of several."""
        assert self._share is not None
        chosen: list[ExpertKey] = []
        blocked = {*self._event, *self._loading}
        above = {other: self._held[other] - share for other, share in self._share.items() if other != layer}
        while above and len(chosen) < n:
            most = max(above, key=lambda other: above[other])
            more = self.policy.victims(1, blocked, most) if self._held[most] else None
            if more:
                chosen += more
                blocked.update(more)
                above[most] -= 1
            else:
                del above[most]
        return chosen

    def _vacate(self, key: ExpertKey) -> None:
        super()._vacate(key)
        self._foretold.discard(key)
