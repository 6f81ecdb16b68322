"""The expert cache's state machine: examples, and random events, failures and cancels with every invariant checked."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache.expert_cache import ExpertCache, SlotState
from cache.keys import ExpertKey
from cache.policies import PolicyContext, make_policy
from cache.shares import layer_shares
from tests.cache.specs import SPECS, make


def key(expert: int, layer: int = 0) -> ExpertKey:
    return ExpertKey(layer, expert)


def serve(cache: ExpertCache, layer: int, *experts: int) -> None:
    """One whole event, loading in waves as the runtime does."""
    found = cache.lookup(layer, experts)
    for hit in found.hits:
        cache.release(hit)
    misses = list(found.misses)
    while misses:
        loads = cache.reserve(misses)
        assert loads, "an event always makes progress"
        for load in loads:
            misses.remove(load.key)
            cache.commit(load.key)
            cache.release(load.key)
    cache.end_event()


@pytest.fixture
def cache() -> ExpertCache:
    return ExpertCache(3, make_policy("lru"))


def test_an_event_is_classified_before_anything_is_admitted(cache: ExpertCache) -> None:
    serve(cache, 0, 1, 2)
    cache.lookup(0, [9])
    cache.reserve([key(9)])
    cache.end_event()
    found = cache.lookup(0, [1, 9, 5, 1])
    assert found == ([key(1)], [key(9)], [key(5)])
    counters = cache.counters.decode
    assert (counters.hits, counters.pending, counters.misses) == (1, 1, 4)


def test_prefill_and_decode_are_counted_apart(cache: ExpertCache) -> None:
    cache.lookup(0, [1, 2], decode=False)
    cache.end_event()
    assert (cache.counters.prefill.misses, cache.counters.decode.misses) == (2, 0)
    assert cache.counters.decode.hit_rate is None


def test_keys_of_the_event_are_not_victims(cache: ExpertCache) -> None:
    serve(cache, 0, 1, 2, 3)
    found = cache.lookup(0, [1, 4])
    (load,) = cache.reserve(found.misses)
    assert load.victim == key(2)
    assert cache.state(key(1)) is SlotState.READY


def test_an_event_larger_than_the_cache_waits_for_released_keys(cache: ExpertCache) -> None:
    serve(cache, 0, 1, 2, 3)
    found = cache.lookup(0, [1, 2, 3, 4])
    assert cache.reserve(found.misses) == []
    cache.release(key(2))
    (load,) = cache.reserve(found.misses)
    assert load.victim == key(2)


def test_outsiders_go_before_released_keys_of_the_event() -> None:
    cache = ExpertCache(3, make_policy("lfu"))
    for _ in range(5):
        serve(cache, 1, 9)  # frequent, but outside the event below
    serve(cache, 0, 1, 2)
    found = cache.lookup(0, [1, 2, 3])
    cache.release(key(1))
    (load,) = cache.reserve(found.misses)
    assert load.victim == key(9, layer=1)


def test_one_slot_serves_any_event() -> None:
    cache = ExpertCache(1, make_policy("lru"))
    serve(cache, 0, *range(8))
    assert cache.resident() == {key(7)}


def test_loading_slots_are_never_victims() -> None:
    cache = ExpertCache(1, make_policy("lru"))
    cache.lookup(0, [1])
    cache.reserve([key(1)])
    cache.end_event()  # cancelled: the load goes on
    found = cache.lookup(0, [2])
    assert cache.reserve(found.misses) == []
    cache.commit(key(1))
    assert cache.reserve(found.misses)[0].victim == key(1)


def test_an_abandoned_load_frees_its_slot(cache: ExpertCache) -> None:
    cache.lookup(0, [1])
    cache.reserve([key(1)])
    cache.abandon(key(1))
    cache.end_event()
    assert cache.resident() == set()
    assert cache.counters.failed_loads == 1


def test_a_prefetch_takes_free_slots_and_cold_ones_but_few() -> None:
    cache = ExpertCache(8, make_policy("lru"))
    serve(cache, 0, *range(7))
    cache.lookup(0, [0, 1])
    loads = cache.reserve_ahead([key(6), key(9, layer=1), key(8, layer=1), key(7, layer=1)])
    assert [load.key for load in loads] == [key(9, layer=1), key(8, layer=1)], "a quarter of the slots"
    assert [load.victim for load in loads] == [None, key(2)], "neither the event's keys nor those predicted go"
    assert cache.reserve_ahead([key(7, layer=1)]) == []
    assert ExpertCache(3, make_policy("lru")).reserve_ahead([key(1)]) == [], "a tiny cache has no slot to spare"


def test_what_was_loaded_ahead_stays_until_its_event() -> None:
    cache = ExpertCache(8, make_policy("lru"))
    serve(cache, 0, *range(8))
    cache.lookup(0, [0])
    ahead = [load.key for load in cache.reserve_ahead([key(8, layer=2), key(9, layer=2)])]
    assert ahead == [key(8, layer=2), key(9, layer=2)]
    for wanted in ahead:
        cache.commit(wanted)
    cache.end_event()
    serve(cache, 1, *range(6))
    assert cache.resident() == {*ahead, *(key(expert, layer=1) for expert in range(6))}, "the coldest, but foretold"
    serve(cache, 3, *range(7))
    assert ahead[0] not in cache.resident() and ahead[1] in cache.resident(), "they go when nothing else is left"
    serve(cache, 2, 1)
    serve(cache, 3, *range(7))
    assert ahead[1] not in cache.resident(), "its event has come and did not want it"


def test_a_load_that_nobody_waits_for_must_repay_its_victim() -> None:
    cache = ExpertCache(8, make_policy("lru"))
    serve(cache, 0, *range(7))
    asked = []

    def repays(new: ExpertKey, victim: ExpertKey) -> bool:
        asked.append((new, victim))
        return victim != key(0)

    wanted = [key(9, layer=1), key(8, layer=1)]
    assert [load.key for load in cache.reserve_ahead(wanted, repays)] == wanted[:1], "a free slot costs nobody anything"
    assert asked == [(wanted[1], key(0))]
    cache.commit(wanted[0])
    serve(cache, 0, 0)
    assert [load.victim for load in cache.reserve_ahead(wanted[1:], repays)] == [key(1)]


def test_misuse_is_refused(cache: ExpertCache) -> None:
    cache.lookup(0, [1])
    with pytest.raises(RuntimeError, match="not ended"):
        cache.lookup(0, [2])
    with pytest.raises(ValueError, match="not loading"):
        cache.commit(key(1))
    with pytest.raises(ValueError, match="does not hold"):
        cache.release(key(5))
    cache.reserve([key(1)])
    with pytest.raises(ValueError, match="resident already"):
        cache.reserve([key(1)])
    with pytest.raises(ValueError, match="at least one slot"):
        ExpertCache(0, make_policy("lru"))


class CacheMachine(RuleBasedStateMachine):
    """Random events with loads that finish late, fail, or outlive their event."""

    @initialize(slots=st.integers(1, 12), policy=st.sampled_from(SPECS))
    def start(self, slots: int, policy: str) -> None:
        self.cache = ExpertCache(slots, make(policy))
        self.open = False
        self.needed: set[ExpertKey] = set()
        self.loading: set[ExpertKey] = set()
        self.ready: set[ExpertKey] = set()

    @precondition(lambda self: not self.open)
    @rule(layer=st.integers(0, 2), experts=st.lists(st.integers(0, 7), min_size=1, max_size=8), decode=st.booleans())
    def lookup(self, layer: int, experts: list[int], decode: bool) -> None:
        found = self.cache.lookup(layer, experts, decode=decode)
        self.needed = {key(expert, layer) for expert in experts}
        assert set(found.hits) == self.needed & self.ready
        assert set(found.pending) == self.needed & self.loading
        assert set(found.misses) == self.needed - self.ready - self.loading
        self.open = True
        self.layer, self.event = layer, set(experts)

    @precondition(lambda self: self.open)
    @rule(limit=st.one_of(st.none(), st.integers(0, 3)))
    def reserve(self, limit: int | None) -> None:
        misses = sorted(self.needed - self.ready - self.loading)
        free = self.cache.slots - len(self.ready) - len(self.loading)
        possible = free + len(self.ready - self.needed)  # a released key may go, too
        loads = self.cache.reserve(misses, limit)
        assert len(loads) == min(len(misses), possible, len(misses) if limit is None else limit)
        for load in loads:
            if load.victim is not None:
                assert load.victim in self.ready - self.needed, "a victim is ready and not needed"
                self.ready.remove(load.victim)
            self.loading.add(load.key)

    @rule(layer=st.integers(0, 2), experts=st.lists(st.integers(0, 7), max_size=4, unique=True))
    def reserve_ahead(self, layer: int, experts: list[int]) -> None:
        predicted = {key(expert, layer) for expert in experts}
        before = len(self.loading)
        for load in self.cache.reserve_ahead([key(expert, layer) for expert in experts]):
            assert load.key in predicted - self.ready - self.loading
            if load.victim is not None:
                assert load.victim in self.ready - predicted, "what is predicted to be needed stays"
                if self.open:
                    assert load.victim.expert not in self.event or load.victim.layer != self.layer
                self.ready.remove(load.victim)
            self.loading.add(load.key)
        assert len(self.loading) <= max(before, self.cache.slots // 4), "most slots stay for demand"

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), good=st.booleans())
    def finish(self, data: st.DataObject, good: bool) -> None:
        done = data.draw(st.sampled_from(sorted(self.loading)))
        self.loading.remove(done)
        if good:
            self.cache.commit(done)
            self.ready.add(done)
        else:
            self.cache.abandon(done)

    @precondition(lambda self: self.open and self.needed & self.ready)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        done = data.draw(st.sampled_from(sorted(self.needed & self.ready)))
        self.cache.release(done)
        self.needed.remove(done)

    @precondition(lambda self: self.open)
    @rule()
    def end(self) -> None:
        self.cache.end_event()
        self.needed, self.open = set(), False

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        assert self.cache.resident() == self.ready | self.loading
        slots = [self.cache.slot(resident) for resident in self.cache.resident()]
        assert len(set(slots)) == len(slots)


def test_a_record_that_another_search_found_leaves_the_plan() -> None:
    """Victims of a wave are searched twice, outside the event and among its own records."""
    cache = ExpertCache(4, make("sieve", "layer"), range(3))
    for experts in ([0], [0], [3], [0, 1, 2]):
        serve(cache, 0, *experts)
        cache.check_integrity()


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestCacheMachine = CacheMachine.TestCase


class LayerMachine(RuleBasedStateMachine):
    """The scope ``layer``: whole events, changes of policy and scope, prefetches; shares hold once reached."""

    @initialize(slots=st.integers(1, 12), policy=st.sampled_from(SPECS))
    def start(self, slots: int, policy: str) -> None:
        self.cache = ExpertCache(slots, make(policy, "layer"), range(3))
        self.scope = "layer"

    @rule(layer=st.integers(0, 2), experts=st.lists(st.integers(0, 7), min_size=1, max_size=8))
    def event(self, layer: int, experts: list[int]) -> None:
        held = Counter(key.layer for key in self.cache.resident())
        serve(self.cache, layer, *experts)
        after = Counter(key.layer for key in self.cache.resident())
        if self.scope == "layer":
            share = layer_shares(self.cache.slots, range(3))
            assert after[layer] <= max(held[layer], share[layer], 1)
            for other in {0, 1, 2} - {layer}:
                borrows = held[layer] < max(1, share[layer])  # one without a share takes another's
                assert after[other] >= min(held[other], 0 if borrows else share[other])

    @rule(layer=st.integers(0, 2), experts=st.lists(st.integers(0, 7), max_size=4, unique=True))
    def prefetch(self, layer: int, experts: list[int]) -> None:
        for load in self.cache.reserve_ahead([key(expert, layer) for expert in experts]):
            assert self.scope == "global" or load.victim is None or load.victim.layer == layer
            self.cache.commit(load.key)

    @rule(policy=st.sampled_from(SPECS), scope=st.sampled_from(["layer", "global"]))
    def change(self, policy: str, scope: str) -> None:
        before = self.cache.resident()
        self.cache.change_policy(make(policy, scope), range(3) if scope == "layer" else None)
        self.scope = scope
        assert self.cache.resident() == before

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        assert not self.cache.resident()

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check_integrity()


LayerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLayerMachine = LayerMachine.TestCase


def test_each_layer_has_its_share() -> None:
    assert layer_shares(7, [4, 2, 9]) == {2: 3, 4: 2, 9: 2}
    cache = ExpertCache(4, make_policy("lru", PolicyContext("layer")), [0, 1])
    serve(cache, 0, 1, 2, 3)
    assert len(cache.resident()) == 2, "the other layer's slots stay free"
    assert cache.has_free_slot(1) and not cache.has_free_slot(0)
    serve(cache, 1, 5, 6)
    assert Counter(key.layer for key in cache.resident()) == {0: 2, 1: 2}


def test_one_slot_is_enough_for_many_layers() -> None:
    cache = ExpertCache(1, make_policy("lru", PolicyContext("layer")), range(3))
    for layer in (0, 1, 2, 1):
        serve(cache, layer, 4, 5)
        assert cache.resident() == {key(5, layer)}


def test_a_layer_below_its_share_takes_from_the_one_furthest_above() -> None:
    cache = ExpertCache(4, make_policy("lru"))
    serve(cache, 0, 1, 2, 3)
    serve(cache, 1, 7)
    cache.change_policy(make_policy("lru", PolicyContext("layer")), [0, 1])
    serve(cache, 1, 8)
    assert cache.resident() == {key(2), key(3), key(7, layer=1), key(8, layer=1)}


def test_a_new_policy_knows_the_coldest_of_the_old_one() -> None:
    cache = ExpertCache(3, make_policy("lfu"))
    for _ in range(3):
        serve(cache, 0, 2)
    serve(cache, 0, 1)
    serve(cache, 0, 3)
    cache.change_policy(make_policy("lru"))
    serve(cache, 0, 4)
    assert cache.resident() == {key(2), key(3), key(4)}
    cache.lookup(0, [1])
    with pytest.raises(RuntimeError, match="open"):
        cache.change_policy(make_policy("lru"))


def test_occupancy_tells_what_is_loading(cache: ExpertCache) -> None:
    serve(cache, 0, 1)
    cache.lookup(0, [2])
    cache.reserve([key(2)])
    assert cache.occupancy() == [(key(1), SlotState.READY), (key(2), SlotState.LOADING)]
    with pytest.raises(RuntimeError, match="open"):
        cache.clear()
