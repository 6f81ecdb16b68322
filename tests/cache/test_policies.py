"""One conformance suite over every registered policy, and what is particular to each."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.keys import ExpertKey
from cache.policies import Policy, PolicyError, make_policy, runtime_policies


def keys(*experts: int, layer: int = 0) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in experts]


def with_resident(spec: str, *experts: int) -> Policy:
    policy = make_policy(spec)
    for key in keys(*experts):
        policy.admit(key)
    return policy


@pytest.mark.parametrize("spec", runtime_policies())
class TestConformance:
    def test_victims_are_exactly_n_distinct_residents(self, spec: str) -> None:
        policy = with_resident(spec, 1, 2, 3, 4)
        victims = policy.victims(3, ())
        assert victims is not None
        assert len(set(victims)) == 3
        assert set(victims) <= policy.resident()

    def test_too_many_victims_gives_none_and_changes_nothing(self, spec: str) -> None:
        policy = with_resident(spec, 1, 2, 3)
        assert policy.victims(3, set(keys(2))) is None
        assert policy.resident() == set(keys(1, 2, 3))
        assert policy.victims(2, set(keys(2))) is not None

    def test_protected_keys_are_never_victims(self, spec: str) -> None:
        policy = with_resident(spec, 1, 2, 3)
        assert policy.victims(1, set(keys(1, 3))) == keys(2)

    def test_asking_changes_nothing(self, spec: str) -> None:
        policy = with_resident(spec, *range(10))
        policy.record_event(keys(3, 5, 7))
        assert policy.victims(4, ()) == policy.victims(4, ())
        policy.check_integrity()

    def test_layer_restricts_the_choice(self, spec: str) -> None:
        policy = with_resident(spec, 1, 2)
        policy.admit(ExpertKey(7, 1))
        assert policy.victims(1, (), layer=7) == [ExpertKey(7, 1)]
        assert policy.victims(2, (), layer=7) is None

    def test_zero_victims_is_always_possible(self, spec: str) -> None:
        assert make_policy(spec).victims(0, ()) == []

    def test_cold_gives_what_there_is(self, spec: str) -> None:
        assert set(with_resident(spec, 1, 2).cold(5)) == set(keys(1, 2))
        assert make_policy(spec).cold(5) == []

    def test_evicted_keys_are_gone(self, spec: str) -> None:
        policy = with_resident(spec, 1, 2)
        policy.evict(ExpertKey(0, 1))
        assert policy.victims(1, ()) == keys(2)
        assert policy.victims(2, ()) is None

    def test_events_of_unknown_keys_are_taken(self, spec: str) -> None:
        policy = with_resident(spec, 1)
        policy.record_event(keys(8, 9))
        assert policy.resident() == set(keys(1))

    def test_used_again_beats_used_once_long_ago(self, spec: str) -> None:
        policy = with_resident(spec, 1, 2)
        policy.record_event(keys(1))
        for _ in range(5):
            policy.record_event(keys(2))
        assert policy.victims(1, ()) == keys(1)

    @settings(max_examples=30, deadline=None)
    @given(st.data())
    def test_stays_consistent(self, spec: str, data: st.DataObject) -> None:
        policy = make_policy(spec)
        resident: set[ExpertKey] = set()
        for _ in range(60):
            event = keys(*data.draw(st.sets(st.integers(0, 20), min_size=1, max_size=4)))
            policy.record_event(event)
            for key in event:
                if key not in resident:
                    if len(resident) >= 8:
                        victims = policy.victims(1, set(event))
                        assert victims is not None and victims[0] in resident - set(event)
                        policy.evict(victims[0])
                        resident.remove(victims[0])
                    policy.admit(key)
                    resident.add(key)
            assert policy.resident() == resident
            policy.check_integrity()


def test_lru_gives_up_the_least_recent() -> None:
    policy = with_resident("lru", 1, 2, 3)
    policy.record_event(keys(1))
    assert policy.victims(3, ()) == keys(2, 3, 1)


def test_lfu_counts_and_breaks_ties_by_age() -> None:
    policy = with_resident("lfu", 1, 2, 3)
    policy.record_event(keys(1, 2))
    policy.record_event(keys(1))
    assert policy.victims(3, ()) == keys(3, 2, 1)


def test_ewma_half_life_decides_between_recent_and_frequent() -> None:
    def victim(spec: str) -> list[ExpertKey] | None:
        policy = with_resident(spec, 1, 2)
        for _ in range(5):
            policy.record_event(keys(1))
        for _ in range(3):
            policy.record_event(keys(2))
        return policy.victims(1, ())

    assert victim("ewma:half_life=1000") == keys(2)  # like LFU: 1 was used more often
    assert victim("ewma:half_life=0.5") == keys(1)  # like LRU: 2 was used last


def test_ewma_scores_are_the_decayed_counts() -> None:
    policy = make_policy("ewma:half_life=2")
    policy.record_event(keys(1))
    policy.record_event(keys(1, 2))
    # at clock 2 with half-life 2: key 1 has 2**-0.5 + 1, key 2 has 1
    difference = policy.score(ExpertKey(0, 1)) - policy.score(ExpertKey(0, 2))  # type: ignore[attr-defined]
    assert 2**difference == pytest.approx(2**-0.5 + 1)


def test_ewma_survives_a_very_long_session() -> None:
    policy = with_resident("ewma:half_life=1", 1, 2)
    for _ in range(3000):
        policy.record_event(keys(1))
    for _ in range(3):
        policy.record_event(keys(2))
    assert policy.victims(1, ()) == keys(1)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mru", ["mru", "ewma", "lfu", "lru"]),
        ("lru:size=3", ["size", "none"]),
        ("ewma:life=3", ["life", "half_life"]),
        ("ewma:half_life=soon", ["half_life", "soon"]),
        ("ewma:half_life=0", ["half_life", "above 0"]),
        ("", ["unknown policy", "lru"]),
    ],
)
def test_bad_specs_say_what_exists(spec: str, words: list[str]) -> None:
    with pytest.raises(PolicyError) as caught:
        make_policy(spec)
    assert all(word in str(caught.value) for word in words)
