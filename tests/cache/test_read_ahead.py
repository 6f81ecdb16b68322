"""Passes of many tokens load what the next event takes: when, how much, and that it costs nothing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.expert_cache import ExpertCache, SlotState
from cache.keys import ExpertKey
from cache.policies import make_policy
from cache.read_ahead import ReadAhead
from cache.shares import even_share

LAYERS, EXPERTS = 8, 32


class Run:
    """Serves events as the runtime does, loads in the order in which they were asked for."""

    def __init__(self, slots: int, policy: str = "ewma", scope: str = "global", layers: int = LAYERS) -> None:
        self.layers = layers
        fill, records = even_share(slots, layers), layers * EXPERTS
        shared = range(layers) if scope == "layer" else None
        self.cache = ExpertCache(slots, make_policy(policy), shared, fill, records)
        self.reading = ReadAhead(self.cache, dict.fromkeys(range(layers), EXPERTS))
        self.read = self.needed = self.ahead = 0

    def reserve(self) -> None:
        loads = self.reading.reserve()
        self.ahead += len(loads)
        self.read += len(loads)
        self.cache.check_integrity()

    def event(self, layer: int, experts: list[int], tokens: int, recent: list[list[int]] | None) -> int:
        """Returns how many of its records were on their way when it began."""
        found = self.reading.take(self.cache.lookup(layer, experts, decode=recent is None, recent=recent))
        self.reading.begin_event(layer, len(experts), tokens, recent)
        pending, waiting = len(found.pending), list(found.misses)
        assert found.pending == self.reading.taken
        flying: list[ExpertKey] = []

        def start() -> None:
            loads = self.cache.reserve(waiting) if waiting else []
            del waiting[: len(loads)]
            flying.extend(load.key for load in loads)
            self.read += len(loads)
            if not waiting:
                self.reserve()

        start()
        for key in (*found.pending, *found.hits):
            if key in found.pending:
                self.cache.commit(key)
            self.cache.release(key)
            start()
        while flying or waiting:
            if flying:
                key = flying.pop(0)
                self.cache.commit(key)
                self.cache.release(key)
            else:  # what was read ahead for another layer holds the slots
                key = next(iter(self.reading.coming))
                self.reading.forget(key)
                self.cache.commit(key)
            start()
        for key in self.reading.left(layer):
            self.reading.forget(key)
            self.cache.commit(key)
        self.cache.end_event()
        self.cache.check_integrity()
        return pending

    def run_pass(self, tokens: int = 512, ends: bool = False, used: int = EXPERTS) -> list[int]:
        held = self.cache.resident().difference(self.reading.coming)
        self.reading.begin_pass(tokens)
        self.reserve()
        pending = []
        for layer in range(self.layers):
            experts = list(range(used))
            self.needed += sum(key not in held for key in self.cache.keys(layer, experts))
            pending.append(self.event(layer, experts, tokens, [[0, 1]] if ends else []))
        return pending


@pytest.mark.parametrize("policy", ["lru", "ewma", "foresight"])
def test_the_next_layer_is_read_ahead_and_nothing_is_read_twice(policy: str) -> None:
    run = Run(96, policy)
    run.run_pass()
    run.run_pass()
    run.read = run.needed = 0
    pending = run.run_pass()
    most = 6  # slots at the cold end: one for 25 of the records that have none
    assert pending == [most] * LAYERS, "the first layer's while the pass before ended"
    assert run.needed <= run.read <= 1.01 * run.needed
    assert [key.layer for key in run.reading.coming] == [0] * most
    assert all(run.cache.state(key) is SlotState.LOADING for key in run.reading.coming)


def test_a_cold_cache_is_filled_ahead() -> None:
    run = Run(LAYERS * EXPERTS)  # everything fits
    pending = run.run_pass(ends=True)
    assert pending[0] == 0, "nothing is known before the first event"
    assert min(pending[1:]) >= 1
    assert run.read == run.needed == LAYERS * EXPERTS
    assert run.cache.counters.evictions == 0
    assert run.run_pass(ends=True) == [0] * LAYERS
    assert run.ahead == sum(pending)


def test_a_pass_that_ends_reads_nothing_for_the_next() -> None:
    run = Run(96)
    run.run_pass(ends=True)
    assert not run.reading.coming
    assert run.run_pass(tokens=512)[0] > 0, "as many tokens used all experts before"
    assert run.run_pass(tokens=512, ends=True)[0] > 0
    assert run.run_pass(tokens=40, used=20)[0] == 0, "fewer tokens may not"


def test_where_events_use_fewer_experts_nothing_is_read_ahead() -> None:
    run = Run(96)
    for _ in range(3):
        assert run.run_pass(used=29) == [0] * LAYERS
    assert run.run_pass(used=30)[1:] > [0] * (LAYERS - 1)
    before = run.ahead
    run.event(0, list(range(EXPERTS)), 1, None)  # one token with all of them does not stream
    assert run.ahead == before


def test_what_as_many_tokens_used_is_forgotten_when_they_use_less() -> None:
    run = Run(96)
    run.run_pass(tokens=64, ends=True)
    assert run.run_pass(tokens=64, used=16, ends=True)[0] > 0
    assert run.run_pass(tokens=64, used=16, ends=True)[0] == 0
    assert run.run_pass(tokens=65, ends=True)[0] > 0, "with more it may still hold"


def test_by_layer_only_free_slots_are_taken() -> None:
    run = Run(96, scope="layer")  # 12 for each
    assert run.run_pass()[1:] == [6] * (LAYERS - 1)
    for _ in range(3):
        run.read = run.needed = 0
        assert run.run_pass() == [0] * LAYERS
        assert run.read == run.needed == LAYERS * (EXPERTS - 12)


def test_an_event_that_comes_otherwise_is_served() -> None:
    """Two slots; the layer that a record was read ahead for does not come next."""
    run = Run(2, layers=3)
    run.event(0, list(range(EXPERTS)), 64, [])
    assert [key.layer for key in run.reading.coming] == [1]
    run.event(2, list(range(EXPERTS)), 64, [])
    run.event(0, [3], 1, None)
    run.event(1, [5, 6], 1, None)
    assert ExpertKey(1, 6) in run.cache.resident()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 3), st.sampled_from(["lru", "ewma"]), st.booleans(), st.integers(0, 99))
def test_any_run_is_served(slots: int, layers: int, policy: str, by_layer: bool, seed: int) -> None:
    """Passes of all sizes, broken off anywhere: each record is read once at most in an event, and few for nothing."""
    run, chance = Run(slots, policy, "layer" if by_layer else "global", layers), random.Random(seed)
    most = max(1, slots // 8)
    for _ in range(8):
        tokens = chance.choice([1, 4, 64, 512])
        ends = chance.random() < 0.5
        run.reading.begin_pass(tokens)
        run.reserve()
        for layer in range(chance.randint(1, layers) if chance.random() < 0.3 else layers):
            used = EXPERTS if tokens == 512 else min(EXPERTS, chance.randint(tokens, 2 * tokens + 1))
            experts = chance.sample(range(EXPERTS), used)
            before = len(run.reading.coming)
            pending = run.event(layer, experts, tokens, None if tokens == 1 else [experts[:2]] if ends else [])
            assert pending <= min(before, used)
            assert len(run.reading.coming) <= most
            assert len(run.cache.resident()) <= slots


class Rows(Run):
    """Passes of rows that decode: all they take is of recent use, and some of the next layer's is told before.

    ``mood`` decides what is computed next where that is free: a hit whose slot is of no use, or what has arrived.
    """

    def __init__(self, slots: int, scope: str, layers: int, mood: random.Random) -> None:
        super().__init__(slots, "ewma", scope, layers)
        self.mood = mood
        self.log: list[tuple[ExpertKey, int, ExpertKey | None]] = []

    def rows_event(self, layer: int, experts: list[int], told: list[int]) -> None:
        cache, reading = self.cache, self.reading
        found = reading.take(cache.lookup(layer, experts, recent=[experts]))
        reading.begin_event(layer, len(experts), 4, [experts])
        waiting, flying = list(found.misses), []

        def start() -> None:
            loads = cache.reserve(waiting) if waiting else []
            del waiting[: len(loads)]
            flying.extend(load.key for load in loads)
            if not waiting:
                ahead = reading.reserve()
                self.ahead += len(ahead)
                loads += ahead
            self.log += loads
            self.read += len(loads)
            cache.check_integrity()

        def use(key: ExpertKey, arrived: bool) -> None:
            if arrived:
                cache.commit(key)
            cache.release(key)
            start()

        start()
        if told and (after := reading.after(layer)) is not None and not reading.aims:
            reading.expect(after, told)
            start()
        for key in found.pending:
            use(key, True)
        hits = sorted(found.hits, key=cache.makes_room, reverse=True)
        while hits or flying or waiting:
            free = hits and not cache.makes_room(hits[0])
            if flying and (not hits or (free and self.mood.random() < 0.5)):
                use(flying.pop(0), True)
            elif hits:
                use(hits.pop(0), False)
            else:
                key = next(iter(reading.coming))
                reading.forget(key)
                cache.commit(key)
                start()
        for key in reading.left(layer):
            reading.forget(key)
            cache.commit(key)
        cache.end_event()

    def rows_pass(self, taken: list[list[int]], told: list[list[int]]) -> None:
        held = self.cache.resident().difference(self.reading.coming)
        self.reading.begin_pass(4)
        self.reserve()
        for layer, experts in enumerate(taken):
            self.needed += sum(key not in held for key in self.cache.keys(layer, experts))
            self.rows_event(layer, experts, told[layer + 1] if layer + 1 < len(told) else [])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.booleans(), st.integers(0, 999))
def test_what_rows_evict_does_not_depend_on_when_reads_end(slots: int, layers: int, by_layer: bool, seed: int) -> None:
    scope = "layer" if by_layer else "global"
    runs = [Rows(slots, scope, layers, random.Random(mood)) for mood in (1, 2)]
    for run in runs:
        chance = random.Random(seed)
        for _ in range(6):
            taken = [chance.sample(range(EXPERTS), chance.randint(1, 20)) for _ in range(layers)]
            told = [chance.sample([*experts, *range(5)], min(6, len(experts))) for experts in taken]
            run.rows_pass(taken, [list(dict.fromkeys(each)) for each in told])
    first, second = ((run.log, run.cache.counters, run.cache.resident(), run.ahead) for run in runs)
    assert first == second


def test_rows_keep_what_was_read_ahead_as_they_keep_what_they_missed() -> None:
    """Without that it would be read in every pass again, being at the cold end."""
    chance = random.Random(0)
    favourites = [[chance.sample(range(EXPERTS), 10) for _ in range(LAYERS)] for _ in range(2)]
    reads = []
    for tells in (False, True):
        run = Rows(128, "global", LAYERS, random.Random(0))
        for number in range(40):
            taken = [[*each, *random.Random(number).sample(range(EXPERTS), 4)] for each in favourites[number // 20]]
            taken = [list(dict.fromkeys(each)) for each in taken]
            run.rows_pass(taken, taken if tells else [[]] * LAYERS)
        assert bool(run.ahead) == tells
        assert run.read <= 1.05 * run.needed
        reads.append(run.read)
    assert reads[1] <= 1.05 * reads[0]
