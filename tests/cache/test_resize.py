"""Slots that are given up and taken again between events: the coldest go, and the log of a run repeats it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.cache_log import CacheSetup, LoggedCache, load_log, replay_log
from cache.expert_cache import ExpertCache
from cache.keys import ExpertKey
from cache.policies import make_policy


def event(cache: ExpertCache, layer: int, experts: list[int]) -> None:
    found = cache.lookup(layer, experts)
    misses = list(found.misses)
    for key in found.hits:
        cache.release(key)
    while misses:
        for load in cache.reserve(misses):
            misses.remove(load.key)
            cache.commit(load.key)
            cache.release(load.key)
    cache.end_event()


def test_the_coldest_go_first() -> None:
    cache = ExpertCache(6, make_policy("lru"))
    for expert in (0, 1, 2, 3, 0):
        event(cache, 0, [expert])
    gone = cache.retire(4)
    assert len(gone) == 4 and cache.slots == 2
    assert cache.resident() == {ExpertKey(0, 3), ExpertKey(0, 0)}, "free slots first, then the least recent"
    cache.check_integrity()
    assert cache.retire(5) != [] and cache.slots == 1, "one slot stays"
    event(cache, 1, [0, 1, 2, 3])
    with pytest.raises(ValueError, match="in use"):
        cache.grow([next(slot for slot in range(6) if slot not in cache._retired)])
    cache.grow([gone[0], 9])
    assert cache.slots == 3
    cache.check_integrity()


def test_not_in_the_middle_of_an_event() -> None:
    cache = ExpertCache(3, make_policy("lru"))
    cache.lookup(0, [1])
    with pytest.raises(RuntimeError, match="event is open"):
        cache.retire(1)
    cache.reserve([ExpertKey(0, 1)])
    cache.end_event()
    with pytest.raises(RuntimeError, match="loading"):
        cache.retire(1)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 2), st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True)),
            st.integers(1, 14),
        ),
        max_size=25,
    ),
    st.integers(1, 4),
    st.sampled_from(["layer", "global"]),
    st.sampled_from(["lru", "ewma", "foresight"]),
)
def test_any_sizes(steps: list[object], segment: int, scope: str, policy: str) -> None:
    setup = CacheSetup(policy, scope, 8, (0, 1, 2), 6)
    cache = LoggedCache(setup)
    for step in steps:
        if isinstance(step, tuple):
            event(cache, *step)
        elif isinstance(step, int) and step < cache.slots:
            wanted = cache.slots - step
            before = cache.resident()
            gone = cache.retire(wanted, segment)
            assert cache.resident() <= before
            whole = {slot // segment for slot in gone}
            assert all(
                slot in cache._retired
                for number in whole
                for slot in range(number * segment, min(len(cache._key), (number + 1) * segment))
            )
        elif isinstance(step, int):
            missing = sorted(set(range(14)) - (set(range(len(cache._key))) - cache._retired))
            cache.grow(missing[: step - cache.slots])
            assert cache.slots == step
        cache.check_integrity()
    entries = [json.loads(json.dumps(entry)) for entry in cache.log]
    assert replay_log([*entries, ["counters", asdict(cache.counters)]]) == cache.counters


def test_a_saved_log_with_changes_of_size(tmp_path: Path) -> None:
    cache = LoggedCache(CacheSetup("lru", "global", 4, (0,), 8))
    event(cache, 0, [1, 2, 3])
    cache.grow([4, 5])
    event(cache, 0, [4, 5, 6])
    cache.retire(4)
    cache.save(tmp_path / "log")
    assert replay_log(load_log(tmp_path / "log")) == cache.counters


def test_what_was_asked_before_a_victim_went_is_logged(tmp_path: Path) -> None:
    cache = LoggedCache(CacheSetup("lru", "global", 8, (0,), 16))
    for expert in range(8):
        for load in cache.reserve(cache.lookup(0, [expert]).misses):
            cache.commit(load.key)
        cache.end_event()
    wanted = [ExpertKey(0, 9), ExpertKey(0, 10)]
    assert len(cache.reserve_ahead(wanted, lambda key, victim: key == wanted[0])) == 1
    assert cache.reserve_ahead(wanted, lambda key, victim: False) == []
    cache.save(tmp_path / "log")
    assert replay_log(load_log(tmp_path / "log")) == cache.counters
