"""The history of every expert: counts and the passes of the last use."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cache.expert_cache import ExpertCache, Lookup, SlotState
from cache.keys import ExpertKey
from cache.policies import make_policy
from cache.usage import ExpertUsage


def test_hits_misses_and_pendings_are_told_apart() -> None:
    usage = ExpertUsage({3: 2, 1: 4})
    usage.record(1, Lookup([ExpertKey(1, 0)], [ExpertKey(1, 1)], [ExpertKey(1, 2)]), 5)
    usage.record(1, Lookup([ExpertKey(1, 2)], [], []), 6)
    usage.record(3, Lookup([], [], [ExpertKey(3, 1)]), 6)
    assert usage.layers == (1, 3)
    assert [list(row) for row in usage.hits] == [[1, 0, 1, 0], [0, 0]]
    assert [list(row) for row in usage.misses] == [[0, 0, 1, 0], [0, 1]]
    assert [list(row) for row in usage.last_use] == [[5, 5, 6, -1], [-1, 6]]
    assert [list(row) for row in usage.last_miss] == [[-1, -1, 5, -1], [-1, 6]]
    assert usage.forward == 6


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), max_size=20))
def test_it_counts_what_the_cache_counts(events: list[list[int]]) -> None:
    cache, usage = ExpertCache(3, make_policy("lru")), ExpertUsage({0: 6})
    for forward, experts in enumerate(events):
        found = cache.lookup(0, experts)
        usage.record(0, found, forward)
        for load in cache.reserve(found.misses):
            cache.commit(load.key)
        cache.end_event()
    counted = cache.counters.decode
    assert (sum(usage.hits[0]), sum(usage.misses[0])) == (counted.hits, counted.misses)
    assert {key for key, _ in cache.occupancy()} == cache.resident()
    assert all(state is SlotState.READY for _, state in cache.occupancy())
