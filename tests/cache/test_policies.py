"""One conformance suite over every registered policy, and what is particular to each."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.counts import load_counts, save_counts
from cache.keys import ExpertKey
from cache.policies import Policy, PolicyContext, PolicyError, make_policy
from tests.cache.specs import SPECS, keys, make


def with_resident(spec: str, *experts: int, scope: str = "global") -> Policy:
    policy = make(spec, scope)
    for key in keys(*experts):
        policy.admit(key)
    return policy


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("spec", SPECS)
class TestConformance:
    def test_victims_are_exactly_n_distinct_residents(self, spec: str, scope: str) -> None:
        policy = with_resident(spec, 1, 2, 3, 4, scope=scope)
        victims = policy.victims(3, ())
        assert victims is not None
        assert len(set(victims)) == 3
        assert set(victims) <= policy.resident()

    def test_too_many_victims_gives_none_and_changes_nothing(self, spec: str, scope: str) -> None:
        policy = with_resident(spec, 1, 2, 3, scope=scope)
        assert policy.victims(3, set(keys(2))) is None
        assert policy.resident() == set(keys(1, 2, 3))
        assert policy.victims(2, set(keys(2))) is not None

    def test_protected_keys_are_never_victims(self, spec: str, scope: str) -> None:
        policy = with_resident(spec, 1, 2, 3, scope=scope)
        assert policy.victims(1, set(keys(1, 3))) == keys(2)

    def test_asking_changes_nothing(self, spec: str, scope: str) -> None:
        policy = with_resident(spec, *range(10), scope=scope)
        policy.record_event(keys(3, 5, 7))
        assert policy.victims(4, ()) == policy.victims(4, ())
        policy.check_integrity()

    def test_layer_restricts_the_choice(self, spec: str, scope: str) -> None:
        policy = with_resident(spec, 1, 2, scope=scope)
        policy.admit(ExpertKey(7, 1))
        assert policy.victims(1, (), layer=7) == [ExpertKey(7, 1)]
        assert policy.victims(2, (), layer=7) is None

    def test_the_lowest_score_goes_first(self, spec: str, scope: str) -> None:
        policy = with_resident(spec, *range(5), scope=scope)
        for experts in ((1, 2), (2, 3), (2, 4), (0, 2)):
            policy.record_event(keys(*experts))
        scores = {key: policy.score_now(key) for key in policy.resident()}
        if spec in ("lfu", "ewma", "foresight"):
            assert None not in scores.values() and policy.score_now(ExpertKey(50, 900)) in (None, 0)
        found = [score for score in scores.values() if score is not None]
        if found:
            victims = policy.victims(1, ())
            assert victims is not None and scores[victims[0]] == min(found) and len(found) == len(scores)

    def test_zero_victims_is_always_possible(self, spec: str, scope: str) -> None:
        assert make(spec, scope).victims(0, ()) == []

    def test_cold_gives_what_there_is(self, spec: str, scope: str) -> None:
        assert set(with_resident(spec, 1, 2, scope=scope).cold(5)) == set(keys(1, 2))
        assert make(spec, scope).cold(5) == []

    def test_evicted_keys_are_gone(self, spec: str, scope: str) -> None:
        policy = with_resident(spec, 1, 2, scope=scope)
        policy.evict(ExpertKey(0, 1))
        assert policy.victims(1, ()) == keys(2)
        assert policy.victims(2, ()) is None

    def test_what_is_held_beside_the_residents_is_bounded(self, spec: str, scope: str) -> None:
        policy = with_resident(spec, *range(200), scope=scope)
        policy.record_event(keys(*range(0, 200, 3)))
        for key in keys(*range(190)):
            policy.evict(key)
            policy.check_integrity()

    def test_events_of_unknown_keys_are_taken(self, spec: str, scope: str) -> None:
        policy = with_resident(spec, 1, scope=scope)
        policy.record_event(keys(8, 9))
        assert policy.resident() == set(keys(1))

    def test_cold_honours_layer_and_protected(self, spec: str, scope: str) -> None:
        policy = with_resident(spec, 1, 2, scope=scope)
        policy.admit(ExpertKey(7, 1))
        assert set(policy.cold(5, set(keys(1)), 0)) == set(keys(2))
        assert len(policy.cold(1)) == 1

    def test_two_of_them_with_one_seed_agree(self, spec: str, scope: str) -> None:
        one, other = (make(spec, scope, seed=5) for _ in range(2))
        for policy in (one, other):
            for key in keys(*range(12)):
                policy.admit(key)
            policy.record_event(keys(3, 1))
        assert one.victims(6, set(keys(1))) == other.victims(6, set(keys(1)))

    @settings(max_examples=15, deadline=None)
    @given(st.data())
    def test_stays_consistent(self, spec: str, scope: str, data: st.DataObject) -> None:
        policy = make(spec, scope)
        resident: set[ExpertKey] = set()
        for _ in range(40):
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


@pytest.mark.parametrize("spec", sorted({*SPECS} - {"random", "static"}))
def test_used_again_beats_used_once_long_ago(spec: str) -> None:
    policy = with_resident(spec, 1, 2)
    policy.record_event(keys(1))
    for _ in range(5):
        policy.record_event(keys(2))
    assert policy.victims(1, ()) == keys(1)


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
        ("mru", ["mru", "ewma", "lfu", "lru", "s3fifo"]),
        ("belady", ["future", "replay", "ewma"]),
        ("static", ["static:FILE"]),
        ("static:missing.json", ["missing.json", "neither a trace nor"]),
        ("slru:protected=1.5", ["protected", "between 0 and 1"]),
        ("s3fifo:small=0", ["small", "between 0 and 1"]),
        ("foresight:rate=2", ["rate", "at most 1"]),
        ("foresight:experts=2", ["experts", "half_life"]),
        ("arc:p=1", ["arc", "none"]),
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


def test_an_unknown_scope_says_which_there_are() -> None:
    with pytest.raises(PolicyError, match="layer, global"):
        make_policy("lru", PolicyContext("model"))


def test_bad_parameters_are_said_at_once_under_the_scope_layer() -> None:
    with pytest.raises(PolicyError, match="half_life"):
        make_policy("ewma:half_life=0", PolicyContext("layer"))


def test_random_depends_on_the_seed_alone_and_takes_everybody() -> None:
    answers = {seed: make("random", seed=seed) for seed in range(40)}
    first = set()
    for policy in answers.values():
        for key in keys(*range(4)):
            policy.admit(key)
        first.add(tuple(policy.victims(1, ()) or ()))
    assert first == {(key,) for key in keys(*range(4))}


def test_static_goes_by_a_file(tmp_path: Path) -> None:
    path = tmp_path / "uses.json"
    save_counts(path, {ExpertKey(0, 1): 5.0, ExpertKey(0, 2): 1.0, ExpertKey(3, 0): 2.0})
    policy = make_policy(f"static:{path}")
    for key in keys(1, 2, 3):
        policy.admit(key)
    policy.record_event(keys(3, 3, 3))
    assert policy.victims(3, ()) == keys(3, 2, 1)
    assert load_counts(path) == {
        **{ExpertKey(0, expert): float(uses) for expert, uses in enumerate((0, 5, 1))},
        **{ExpertKey(3, expert): float(uses) for expert, uses in enumerate((2, 0, 0))},
    }


@pytest.mark.parametrize("text", ["[]", "{", '{"0": [-1]}', '{"x": [1]}', '{"0": [NaN]}', '{"0": 3}'])
def test_bad_counts_are_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "uses.json").write_text(text)
    with pytest.raises(PolicyError, match=r"uses\.json") as caught:
        make_policy(f"static:{tmp_path / 'uses.json'}")
    assert "\n" not in str(caught.value)


def test_sieve_spares_what_was_used_once() -> None:
    policy = with_resident("sieve", 1, 2, 3)
    policy.record_event(keys(1))
    assert policy.victims(1, ()) == keys(2)
    policy.evict(ExpertKey(0, 2))
    policy.admit(ExpertKey(0, 4))
    assert policy.victims(3, ()) == keys(3, 4, 1), "the hand stands behind 1 and meets it last"


def test_a_failed_load_does_not_move_the_hand() -> None:
    policy = with_resident("sieve", 1, 2)
    policy.record_event(keys(1))
    policy.admit(ExpertKey(0, 3))
    policy.evict(ExpertKey(0, 3))
    policy.record_event(keys(2))
    assert policy.victims(2, ()) == keys(1, 2)


def test_least_stale_keeps_what_this_pass_has_prefetched() -> None:
    def victim(spec: str) -> list[ExpertKey] | None:
        policy = make(spec)
        for layer in (0, 1, 2):
            policy.record_event(keys(1, layer=layer))
            policy.admit(ExpertKey(layer, 1))
        policy.record_event(keys(1))  # the next token
        policy.evict(ExpertKey(2, 1))
        policy.admit(ExpertKey(2, 5))  # on a prediction
        policy.record_event(keys(1, layer=1))
        return policy.victims(2, ())

    assert victim("lru") == [ExpertKey(0, 1), ExpertKey(2, 5)]
    assert victim("least-stale") == [ExpertKey(0, 1), ExpertKey(1, 1)]


def test_foresight_learns_what_follows_what() -> None:
    policy = make("foresight")
    for key in keys(0, 1, 2):
        policy.admit(key)
    for number in range(300):  # 2 comes after 1 comes after 0
        policy.record_event(keys(number % 3))
    policy.record_event(keys(0))
    assert policy.victims(2, ()) == keys(0, 2), "1 comes next"
    policy.record_event(keys(1))
    assert policy.victims(2, ()) == keys(1, 0), "now 2 does"


def test_foresight_without_room_for_tables_is_ewma() -> None:
    bare, ewma = make("foresight:table_mib=0"), make("ewma")
    for policy in (bare, ewma):
        for key in keys(*range(6)):
            policy.admit(key)
    for number in range(60):
        event = keys(number * number % 6, number % 6) if number * number % 6 != number % 6 else keys(number % 6)
        for policy in (bare, ewma):
            policy.record_event(event)
        assert bare.victims(1, ()) == ewma.victims(1, ())
    bare.check_integrity()


def test_foresight_goes_on_when_an_expert_is_above_all_known() -> None:
    policy = make_policy("foresight", PolicyContext(layers=1, experts=4))
    for number in range(40):
        policy.record_event(keys(number % 3))
    policy.record_event(keys(100))
    policy.admit(ExpertKey(0, 100))
    policy.admit(ExpertKey(0, 2))
    policy.admit(ExpertKey(0, 200))
    policy.check_integrity()
    assert policy.victims(1, ()) == keys(200)


def test_foresight_survives_a_very_long_session() -> None:
    policy = make("foresight:half_life=1")
    for key in keys(1, 2):
        policy.admit(key)
    for _ in range(2000):
        policy.record_event(keys(1))
    for _ in range(3):
        policy.record_event(keys(2))
    policy.check_integrity()
    assert policy.victims(1, ()) == keys(1)
