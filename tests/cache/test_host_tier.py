"""The host tier: no buffer is lost or has two records, and what is pinned or loading stays."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache.host_tier import HostTier
from cache.keys import ExpertKey
from cache.policies import make_policy

KEYS = st.builds(ExpertKey, st.integers(0, 2), st.integers(0, 5))


class HostMachine(RuleBasedStateMachine):
    """Random loads, demotions, pins and sizes, against a plain set."""

    @initialize(slots=st.integers(0, 6), policy=st.sampled_from(["lru", "ewma", "lfu"]))
    def start(self, slots: int, policy: str) -> None:
        self.tier = HostTier(slots, make_policy(policy))
        self.ready: set[ExpertKey] = set()
        self.loading: set[ExpertKey] = set()
        self.pins: list[ExpertKey] = []
        self.spare = list(range(slots, 10))

    @rule(keys=st.lists(KEYS, max_size=4, unique=True))
    def event(self, keys: list[ExpertKey]) -> None:
        self.tier.record_event(keys)

    @rule(key=KEYS)
    def load(self, key: ExpertKey) -> None:
        if key in self.ready or key in self.loading:
            with pytest.raises(ValueError, match="here already"):
                self.tier.reserve(key)
            return
        free = self.tier.slots - self.tier.used
        movable = self.ready - set(self.pins)
        reserved = self.tier.reserve(key)
        assert (reserved is None) == (not free and not movable)
        if reserved is not None:
            assert (reserved.victim is None) == bool(free)
            assert reserved.victim is None or reserved.victim in movable
            self.ready.discard(reserved.victim)  # type: ignore[arg-type]
            self.loading.add(key)
            assert self.tier.find(key) is None, "it is not whole yet"

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), arrived=st.booleans())
    def end_load(self, data: st.DataObject, arrived: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.loading)))
        self.loading.remove(key)
        if arrived:
            self.tier.commit(key)
            self.ready.add(key)
        else:
            self.tier.abandon(key)

    @rule(key=KEYS)
    def demote(self, key: ExpertKey) -> None:
        before = self.tier.counters.demoted
        reserved = self.tier.demote(key)
        if reserved is not None:
            assert key not in self.ready and self.tier.find(key) == reserved.slot
            self.ready.discard(reserved.victim)  # type: ignore[arg-type]
            self.ready.add(key)
        assert self.tier.counters.demoted == before + (reserved is not None)

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.ready)))
        self.tier.pin(key)
        self.pins.append(key)
        with pytest.raises(ValueError, match="must stay"):
            self.tier.drop(key)

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self) -> None:
        self.tier.unpin(self.pins.pop())

    @rule(key=KEYS)
    def drop(self, key: ExpertKey) -> None:
        if key in self.ready and key not in self.pins:
            self.tier.drop(key)
            self.ready.remove(key)

    @rule(slots=st.integers(0, 8))
    def resize(self, slots: int) -> None:
        if slots < self.tier.slots:
            gone = self.tier.shrink(slots)
            assert self.tier.slots == max(slots, len(self.loading | set(self.pins)))
            self.spare += gone
            self.ready &= self.tier.resident()
        else:
            more = self.spare[: slots - self.tier.slots]
            del self.spare[: len(more)]
            self.tier.grow(more)

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "tier"):
            self.tier.check_integrity()
            assert self.tier.resident() == self.ready | self.loading
            assert all(self.tier.find(key) is not None for key in self.ready)
            assert set(self.pins) <= self.ready, "pinned records stay"


TestHostMachine = HostMachine.TestCase
TestHostMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_victim_colder_than_everything_is_not_taken_in() -> None:
    tier = HostTier(1, make_policy("lfu"))
    warm, cold = ExpertKey(0, 0), ExpertKey(0, 1)
    for _ in range(3):
        tier.record_event([warm])
    tier.record_event([cold])
    assert tier.demote(warm) is not None
    assert tier.demote(cold) is None
    assert tier.resident() == {warm}
    tier.check_integrity()


def test_no_buffers_at_all() -> None:
    tier = HostTier(0, make_policy("lru"))
    assert tier.reserve(ExpertKey(0, 0)) is None
    assert tier.demote(ExpertKey(0, 0)) is None
    assert tier.find(ExpertKey(0, 0)) is None
    assert tier.counters.hit_rate is None


def test_a_new_policy_is_told_of_what_is_here() -> None:
    tier = HostTier(3, make_policy("lru"))
    for expert in (2, 0, 1):
        assert tier.reserve(ExpertKey(0, expert)) is not None
        tier.commit(ExpertKey(0, expert))
    tier.record_event([ExpertKey(0, 2)])
    tier.change_policy(make_policy("slru"))
    tier.check_integrity()
    reserved = tier.reserve(ExpertKey(0, 7))
    assert reserved is not None and reserved.victim == ExpertKey(0, 0), "the coldest of the policy before"
    tier.check_integrity()
