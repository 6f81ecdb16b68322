"""Events of many tokens stream: they read each record once and leave what other layers and later tokens use."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.expert_cache import ExpertCache
from cache.keys import ExpertKey
from cache.policies import make_policy
from cache.shares import passing_slots

LAYERS, EXPERTS = 8, 32
POLICIES = ("lru", "lfu", "ewma")


def serve(
    cache: ExpertCache, layer: int, experts: Sequence[int], recent: Sequence[Sequence[int]] | None = None
) -> tuple[int, int]:
    """One event as the runtime serves it, four loads in flight; returns hits and loads."""
    found = cache.lookup(layer, experts, decode=recent is None, recent=recent)
    misses, hits, flying = list(found.misses), list(found.hits), []
    loads = 0
    while misses or hits or flying:
        for load in cache.reserve(misses, 4 - len(flying)) if misses else []:
            misses.remove(load.key)
            flying.append(load.key)
            loads += 1
        if hits:
            cache.release(hits.pop())
        elif flying:
            key = flying.pop(0)
            cache.commit(key)
            cache.release(key)
        else:
            assert not misses, "an event always comes to its end"
    cache.end_event()
    cache.check_integrity()
    return len(found.hits), loads


def run_pass(cache: ExpertCache, recent: bool, experts: Sequence[int] = range(EXPERTS)) -> tuple[int, int]:
    counts = [serve(cache, layer, experts, [[0, 1]] if recent else []) for layer in range(LAYERS)]
    return sum(hits for hits, _ in counts), sum(loads for _, loads in counts)


def new_cache(slots: int, policy: str = "ewma") -> ExpertCache:
    return ExpertCache(slots, make_policy(policy), fill=-(-slots // LAYERS))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("residency", [0.25, 0.5, 0.75])
def test_a_pass_over_everything_finds_what_fits(policy: str, residency: float) -> None:
    cache = new_cache(round(LAYERS * EXPERTS * residency), policy)
    run_pass(cache, recent=False)
    for _ in range(3):
        hits, loads = run_pass(cache, recent=False)
        # all but the few slots at the cold end are found where they were; each other record is read once
        assert hits >= cache.slots - 8
        assert hits + loads == LAYERS * EXPERTS
    plain = ExpertCache(cache.slots, make_policy(policy))
    for _ in range(4):
        hits = sum(serve(plain, layer, range(EXPERTS))[0] for layer in range(LAYERS))
    assert hits < cache.slots / 2, "without streaming the layers push each other out"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_long_prompt_does_not_flush_the_cache(policy: str) -> None:
    """A conversation that keeps to a few experts finds them after a prompt that used all."""
    chance = random.Random(3)

    def decode(cache: ExpertCache, tokens: int) -> float:
        hits = sum(
            serve(cache, layer, chance.sample(range(10), 4))[0] for _ in range(tokens) for layer in range(LAYERS)
        )
        return hits / (tokens * LAYERS * 4)

    cache, plain = new_cache(96, policy), ExpertCache(96, make_policy(policy))
    for each in (cache, plain):
        decode(each, 40)
    for _ in range(40):  # chunks
        for layer in range(LAYERS):
            serve(cache, layer, range(EXPERTS), [])
            serve(plain, layer, range(EXPERTS))
    after, flushed = decode(cache, 1), decode(plain, 1)
    assert after > 0.8
    assert after >= flushed + (0.5 if policy == "lru" else 0)  # counts of uses hold out by themselves


def test_the_last_tokens_decide_what_stays() -> None:
    cache = new_cache(96)
    run_pass(cache, recent=False, experts=range(20))  # 12 slots a layer
    for layer in range(LAYERS):
        serve(cache, layer, range(20, 28), [[20, 21, 22], [21, 22, 23]])
    held = [sorted(key.expert for key in cache.resident() if key.layer == layer) for layer in range(LAYERS - 1)]
    for experts in held:
        assert set(experts) >= {20, 21, 22, 23}, "in place of records of the layer that the pass did not need"
        assert len(experts) <= 12 + 4
    # what they used has a score, and a decode event that wants a slot takes it from elsewhere
    serve(cache, 0, [30, 31])
    assert {ExpertKey(0, expert) for expert in (20, 21, 22, 23)} <= cache.resident()


@pytest.mark.parametrize("residency", [0.4, 0.85])
@pytest.mark.parametrize("rows", [6, 100])
def test_a_pass_reads_hardly_more_than_it_must(residency: float, rows: int) -> None:
    """Of what it needs and did not find when it began: 16 layers of 64 experts, each token takes 8 of them."""
    layers, experts, chance = 16, 64, random.Random(5)
    slots = round(layers * experts * residency)
    cache = ExpertCache(slots, make_policy("foresight"), fill=-(-slots // layers), records=layers * experts)
    liked = [[chance.lognormvariate(0, 0.7) for _ in range(experts)] for _ in range(layers)]
    read = needed = 0
    for number in range(8):
        held = cache.resident()
        for layer in range(layers):
            tokens = [list(dict.fromkeys(chance.choices(range(experts), liked[layer], k=9)))[:8] for _ in range(rows)]
            event = list(dict.fromkeys(expert for token in tokens for expert in token))
            recent = tokens[-8:] if rows > 16 else [event]  # a prompt, or rows that decode
            loads = serve(cache, layer, event, recent)[1]
            if number > 2:  # all slots are filled
                read += loads
                needed += sum(key not in held for key in cache.keys(layer, event))
    assert needed > 100
    assert needed <= read <= 1.05 * needed


def test_slots_at_the_cold_end() -> None:
    assert [passing_slots(slots) for slots in (1, 7, 16, 40, 1000)] == [1, 1, 2, 5, 8]
    assert [passing_slots(100, records) for records in (100, 150, 175, 225, 1000)] == [2, 2, 3, 5, 8]
    assert passing_slots(9, 12) == 1


def test_what_passes_through_goes_first_and_stays_when_it_is_used() -> None:
    cache = new_cache(64)
    run_pass(cache, recent=False)
    last = ExpertKey(LAYERS - 1, EXPERTS - 1)
    assert last in cache.resident()
    serve(cache, LAYERS - 1, [EXPERTS - 1])  # decoding uses it
    before = cache.resident()
    for expert in range(8, 14):
        serve(cache, 0, [expert])
    gone = before - cache.resident()
    assert last in cache.resident()
    assert len(gone) == 6
    assert {key.layer for key in gone} == {LAYERS - 1}, "the others at the cold end made room"


def test_victims_do_not_depend_on_when_reads_end() -> None:
    """Both records have arrived, or only the first: nothing goes before all that have a slot are computed."""
    for both in (False, True):
        cache = ExpertCache(2, make_policy("lru"), fill=2)
        loads = cache.reserve(cache.lookup(0, range(4), recent=[]).misses)
        first, second = (load.key for load in loads)
        for key in (first, second) if both else (first,):
            cache.commit(key)
        cache.release(first)
        left = cache.keys(0, [2, 3])
        assert cache.reserve(left) == []
        if not both:
            cache.commit(second)
        cache.release(second)
        assert [load.victim for load in cache.reserve(left)] == [first]


def served(
    cache: ExpertCache, layer: int, experts: Sequence[int], recent: Sequence[Sequence[int]], seed: int
) -> object:
    """What an event loads, in order, and in place of what. A seed puts the hits that make no room anywhere between the
    loads; 0 has all hits first."""
    chance, loads = random.Random(seed), []
    found = cache.lookup(layer, experts, decode=False, recent=recent)
    misses, flying = list(found.misses), []
    first = [key for key in found.hits if not seed or cache.makes_room(key)]
    spare = [key for key in found.hits if key not in first]

    def start() -> None:
        for load in cache.reserve(misses):
            misses.remove(load.key)
            flying.append(load.key)
            loads.append((load.key, load.victim))

    start()
    while first or flying or spare:
        if first:
            cache.release(first.pop(0))
        elif spare and (not flying or chance.random() < 0.5):
            cache.release(spare.pop(0))
        else:
            cache.commit(flying[0])
            cache.release(flying.pop(0))
        start()
    assert not misses
    cache.end_event()
    return loads


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 10**6), st.sampled_from(POLICIES), st.integers(1, 40), st.integers(1, 3), st.none() | st.just(400)
)
def test_when_a_hit_is_computed_changes_no_victim(
    seed: int, policy: str, slots: int, layers: int, records: int | None
) -> None:
    chance = random.Random(seed)
    caches = [ExpertCache(slots, make_policy(policy), fill=-(-slots // layers), records=records) for _ in range(2)]
    for _ in range(12):
        layer, experts = chance.randrange(layers), chance.sample(range(16), chance.randint(1, 16))
        recent = [chance.sample(experts, chance.randint(1, len(experts))) for _ in range(chance.randint(0, 2))]
        whole, mixed = (served(cache, layer, experts, recent, by) for cache, by in zip(caches, (0, seed), strict=True))
        assert whole == mixed
        assert caches[0].resident() == caches[1].resident()


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(POLICIES), st.integers(1, 40), st.integers(1, 3))
def test_any_mix_of_events_is_served(data: st.DataObject, policy: str, slots: int, layers: int) -> None:
    cache = ExpertCache(slots, make_policy(policy), fill=-(-slots // layers))
    for _ in range(data.draw(st.integers(1, 12))):
        experts = data.draw(st.lists(st.integers(0, 15), min_size=1, max_size=16, unique=True))
        recent = data.draw(
            st.none() | st.lists(st.lists(st.sampled_from(experts), unique=True, min_size=1), max_size=2)
        )
        hits, loads = serve(cache, data.draw(st.integers(0, layers - 1)), experts, recent)
        assert hits + loads == len(experts), "each record is read once at most"
        assert len(cache.resident()) <= slots
