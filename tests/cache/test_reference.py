"""Every policy equals its slow reference, event by event, with prefetches and failed loads between."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.keys import ExpertKey
from cache.policies import PolicyContext, make_policy
from tests.cache.reference import REFERENCES
from tests.cache.specs import SPECS, random_events

TRAINING = random_events(60, seed=99)

events = st.lists(
    st.tuples(
        st.integers(0, 2),  # layer
        st.lists(st.integers(0, 6), min_size=1, max_size=4, unique=True),
        st.sampled_from(["", "", "", "prefetch", "fail"]),
        st.integers(0, 6),
    ),
    min_size=1,
    max_size=40,
)


def test_every_policy_has_a_reference() -> None:
    assert sorted(REFERENCES) == sorted(SPECS)


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(events=events, slots=st.integers(4, 9), seed=st.integers(0, 3))
def test_equals_its_reference(spec: str, events: list[tuple[int, list[int], str, int]], slots: int, seed: int) -> None:
    training = TRAINING if spec == "static" else None
    fast = make_policy(spec, PolicyContext("global", seed, training=training))
    slow = REFERENCES[spec](seed, TRAINING)

    def make_room(wanted: int, protected: set[ExpertKey]) -> None:
        short = len(fast.resident()) + wanted - slots
        chosen = fast.victims(short, protected)
        assert chosen == (slow.victims(short, sorted(protected)) if short > 0 else [])
        for key in chosen or ():
            fast.evict(key)
            slow.evict(key)

    def admit(key: ExpertKey) -> None:
        fast.admit(key)
        slow.admit(key)

    for layer, experts, extra, other in events:
        event = [ExpertKey(layer, expert) for expert in experts]
        fast.record_event(event)
        slow.record_event(event)
        misses = [key for key in event if key not in fast.resident()]
        make_room(len(misses), set(event))
        for key in misses:
            admit(key)
        ahead = ExpertKey((layer + 1) % 3, other)
        if extra and ahead not in fast.resident():
            if len(fast.resident()) == slots:
                continue
            admit(ahead)
            if extra == "fail":
                fast.evict(ahead)
                slow.evict(ahead)
        fast.check_integrity()
        assert fast.resident() == set(slow.residents)
    everything = fast.victims(len(fast.resident()), ())
    assert everything == slow.victims(len(slow.residents), [])
