"""Replays: what is counted, that waves end, that prefetches are told apart, and the published figures of two traces."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.events import Events, trace_events
from cache.hardware import HARDWARE, Hardware
from cache.policies import PolicyError
from cache.predictors import PredictorError
from cache.simulate import ReplayResult, ReplaySettings, replay_events
from cache.synthetic import MODELS, synthetic_trace
from cache.trace import load_trace
from tests.cache.specs import SPECS, events_of, random_events

SHARED = Path(__file__).resolve().parents[3] / "shared" / "traces"
# Trace, slots a layer, hit rates in percent: measured by others, layers apart, each request from a cold cache.
PUBLISHED = [
    ("gpt-oss-20b-decode-a", 8, {"lru": 63.71, "lfu": 67.60, "ewma": 68.65, "belady": 76.39}),
    ("gpt-oss-20b-decode-a", 16, {"lru": 89.12, "lfu": 90.54, "ewma": 91.12, "belady": 94.27}),
    ("qwen-route", 16, {"lru": 59.50, "lfu": 60.05, "ewma": 61.37, "belady": 73.16}),
    ("qwen-route", 32, {"lru": 77.93, "lfu": 78.32, "ewma": 79.31, "belady": 86.80}),
]
TOLERANCE = {"lru": 0.005, "lfu": 0.3, "ewma": 0.3, "belady": 0.3}


def run(events: Events, **changes: object) -> ReplayResult:
    return replay_events(events, ReplaySettings(**{"policy": "lru", "scope": "layer"} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "slots", "policy", "rate"),
    [
        (name, slots, policy, rate)
        for name, slots, rates in PUBLISHED
        for policy, rate in rates.items()
        if name == "qwen-route" or (policy, slots) == ("lru", 8)
    ],
)
def test_published_hit_rates(name: str, slots: int, policy: str, rate: float) -> None:
    check_published(name, slots, policy, rate)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "slots", "policy", "rate"),
    [(name, slots, policy, rate) for name, slots, rates in PUBLISHED for policy, rate in rates.items()],
)
def test_all_published_hit_rates(name: str, slots: int, policy: str, rate: float) -> None:
    check_published(name, slots, policy, rate)


def check_published(name: str, slots: int, policy: str, rate: float) -> None:
    path = SHARED / f"{name}.npz"
    if not path.exists():
        pytest.skip("the public trace is not on this machine")
    events = trace_events(load_trace(path))
    result = run(events, policy=policy, slots=slots * len(events.layers()), fresh_per_request=True)
    assert 100 * (result.hit_rate or 0) == pytest.approx(rate, abs=TOLERANCE[policy])


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_foresight_beats_ewma_on_the_public_traces(scope: str) -> None:
    for name, slots, _ in PUBLISHED:
        if not (SHARED / f"{name}.npz").exists():
            pytest.skip("the public traces are not on this machine")
        events = trace_events(load_trace(SHARED / f"{name}.npz"))
        events = events.where(events.request < 6)
        rates = {
            policy: run(events, policy=policy, scope=scope, slots=slots * len(events.layers())).hit_rate or 0
            for policy in ("ewma", "foresight")
        }
        assert rates["foresight"] > rates["ewma"]


def test_cold_and_steady_are_apart() -> None:
    events = events_of([(0, [0]), (0, [1]), (1, [5]), (0, [0]), (0, [2]), (0, [0])])
    result = run(events, slots=4)  # two for each layer
    assert result.layers == (0, 1)
    assert (result.cold.events.tolist(), result.steady.events.tolist()) == ([2, 1], [3, 0])
    assert (result.cold.misses.tolist(), result.steady.misses.tolist()) == ([2, 1], [1, 0])
    assert (result.cold.hits.tolist(), result.steady.hits.tolist()) == ([0, 0], [2, 0])
    assert result.total.evictions.tolist() == [1, 0]
    assert result.hit_rate == 2 / 6
    assert result.total.hit_rates.tolist() == [2 / 5, 0]
    assert result.bytes_read is None
    assert run(events, slots=4, record_bytes=10).bytes_read == 40


def test_each_request_may_start_from_nothing() -> None:
    events = events_of([(0, [0]), (0, [1]), (0, [0]), (0, [1])], request=[0, 0, 1, 1])
    assert run(events, slots=2).total.misses.tolist() == [2]
    assert run(events, slots=2, fresh_per_request=True).total.misses.tolist() == [4]
    kept = run(events, slots=2, fresh_per_request=True, keep_learned=True)
    assert kept.total.misses.tolist() == [4]


def test_what_was_learned_can_outlive_the_cache() -> None:
    sets = [(0, [0])] * 5 + [(0, [expert]) for expert in (0, 1, 2, 0)]
    events = events_of(sets, request=[0] * 5 + [1] * 4)
    knows = run(events, policy="lfu", slots=2, fresh_per_request=True, keep_learned=True)
    assert knows.total.hits.tolist() == [5], "0 was the favourite before, so 1 goes for 2"
    assert run(events, policy="lfu", slots=2, fresh_per_request=True).total.hits.tolist() == [4]


def test_static_learns_from_other_requests() -> None:
    training = events_of([(0, [3]), (0, [3]), (0, [4])])
    events = events_of([(0, [3]), (0, [4]), (0, [5]), (0, [3])])
    assert replay_events(events, ReplaySettings("static", 2, "layer"), training).total.hits.tolist() == [1]
    with pytest.raises(PolicyError, match="static:FILE"):
        run(events, policy="static", slots=2)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("spec", [*SPECS, "belady"])
def test_every_policy_at_every_size(spec: str, scope: str) -> None:
    """Waves included: events of up to 6 experts through one slot."""
    rng = np.random.default_rng(3)
    sets = [(number % 3, rng.choice(9, rng.integers(1, 7), replace=False).tolist()) for number in range(60)]
    events = events_of(sets)
    training = random_events(30)
    before = -1
    for slots in (1, 2, 5, 27):
        result = replay_events(events, ReplaySettings(spec, slots, scope), training)
        again = replay_events(events, ReplaySettings(spec, slots, scope), training)
        assert np.array_equal(result.total.hits, again.total.hits), "deterministic"
        assert result.total.accesses == len(events.experts)
        assert result.total.loads - result.total.evictions.sum() <= slots
        if spec == "belady" and slots > 5:
            assert int(result.total.hits.sum()) >= before
        before = int(result.total.hits.sum())
    assert result.total.misses.sum() == len({(layer, expert) for layer, experts in sets for expert in experts})


def fewest_misses(sets: Sequence[Sequence[int]], slots: int) -> int:
    """By trying every choice of victims."""
    states = {frozenset[int](): 0}
    for wanted in map(frozenset, sets):
        after: dict[frozenset[int], int] = {}
        for state, misses in states.items():
            everything = state | wanted
            spare = sorted(everything - wanted)
            gone = max(0, len(everything) - slots)
            for victims in itertools.combinations(spare, gone):
                new = everything.difference(victims)
                after[new] = min(after.get(new, 10**9), misses + len(wanted - state))
        states = after
    return min(states.values())


@settings(max_examples=150, deadline=None)
@given(
    sets=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=2, unique=True), min_size=1, max_size=12),
    slots=st.integers(2, 4),
)
def test_belady_is_the_optimum(sets: list[list[int]], slots: int) -> None:
    events = events_of([(0, experts) for experts in sets])
    best = fewest_misses(sets, slots)
    for scope in ("layer", "global"):
        assert run(events, policy="belady", scope=scope, slots=slots).total.misses.sum() == best
    for spec in ("lru", "foresight", "sieve"):
        assert run(events, policy=spec, slots=slots).total.misses.sum() >= best


def test_belady_over_all_layers_is_the_optimum() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        sets = [(number % 2, rng.choice(4, 2, replace=False).tolist()) for number in range(10)]
        flat = [[10 * layer + expert for expert in experts] for layer, experts in sets]
        result = run(events_of(sets), policy="belady", scope="global", slots=4)
        assert result.total.misses.sum() == fewest_misses(flat, 4)


def test_an_oracle_makes_hits_of_misses() -> None:
    events = random_events(120, experts=16)
    plain = run(events, slots=24)
    ahead = run(events, slots=24, predictor="oracle", prefetch_limit=2)
    assert ahead.prediction is not None and ahead.prediction.precision == 1 and ahead.prediction.recall == 1
    assert (ahead.hit_rate or 0) > (plain.hit_rate or 0)
    total = ahead.total
    assert total.prefetched.sum() == total.used.sum() + total.wasted.sum() + total.dropped.sum()
    assert total.pending.sum() == total.dropped.sum() == 0, "without hardware all arrive in time"
    assert total.hits.sum() + total.misses.sum() == len(events.experts)
    assert plain.prediction is None


@pytest.mark.parametrize("predictor", ["layer-markov", "previous-token", "popularity", "oracle"])
@pytest.mark.parametrize("slots", [1, 6, 12, 30])
def test_prefetches_are_accounted_for(predictor: str, slots: int) -> None:
    events = random_events(150, experts=12)
    slow = Hardware("slow", disk_bytes_per_s=1e6, link_bytes_per_s=4e6, expert_bytes_per_s=1e9, dense_s=3e-3)
    for scope in ("layer", "global"):
        result = run(
            events, slots=slots, scope=scope, predictor=predictor, prefetch_limit=2, record_bytes=1000, hardware=slow
        )
        total = result.total
        assert total.accesses == len(events.experts)
        assert total.prefetched.sum() == total.used.sum() + total.wasted.sum() + total.dropped.sum()
        assert result.seconds is not None
        assert result.seconds.disk == pytest.approx(total.loads * 1e-3)
        assert result.seconds.link == pytest.approx(total.loads * 0.25e-3)
        assert result.seconds.tokens == 50


def test_time_is_that_of_the_slowest_lane() -> None:
    events = events_of([(0, [0, 1]), (0, [0, 1]), (0, [2])])
    hardware = Hardware("test", disk_bytes_per_s=1e3, link_bytes_per_s=None, expert_bytes_per_s=1e4, dense_s=0.5)
    result = run(events, slots=3, record_bytes=1000, hardware=hardware)
    seconds = result.seconds
    assert seconds is not None and result.prefill_seconds is not None
    assert seconds.stall == pytest.approx(3.0), "three loads of a second, nothing to compute beside them"
    assert seconds.compute == pytest.approx(3 * 0.5 + 5 * 0.1)
    assert seconds.tokens_per_s == pytest.approx(3 / 5)
    assert seconds.link == result.prefill_seconds.total == 0


def test_a_prefetch_hides_in_compute() -> None:
    sets = [(number % 2, [number // 2 % 6]) for number in range(60)]
    hardware = Hardware("test", disk_bytes_per_s=1e3, link_bytes_per_s=None, expert_bytes_per_s=1e9, dense_s=4.0)
    stalls = []
    for predictor in (None, "oracle"):
        result = run(
            events_of(sets), slots=8, scope="global", record_bytes=1000, hardware=hardware, predictor=predictor
        )
        assert result.seconds is not None
        stalls.append(result.seconds.stall)
    assert stalls[1] < stalls[0] / 10


@pytest.mark.parametrize("machine", ["rtx4060", "rtx4090", "laptop-pcie3"])
@pytest.mark.parametrize("share", [0.125, 0.5])
def test_ways_of_misses(machine: str, share: float) -> None:
    """Records and habits of Qwen3-30B-A3B, in four layers."""
    habits = replace(MODELS["qwen3-30b-a3b"], layers=4, requests=1, tokens=96, topic=1.9, overlap=0.56)
    events = trace_events(synthetic_trace(habits))
    hardware = replace(HARDWARE[machine], disk_bytes_per_s=None, dense_s=4 * 77 * 4e-6)
    found = {}
    for miss in ("fetch", "cpu", "auto"):
        slots = int(share * 4 * 128)
        result = run(
            events, policy="ewma", scope="global", slots=slots, record_bytes=2654208, hardware=hardware, miss=miss
        )
        total = result.total
        assert total.accesses == len(events.experts) and result.seconds is not None
        assert (total.on_cpu.sum() > 0) == (miss != "fetch")
        assert total.on_cpu.sum() <= total.misses.sum() and total.admitted.sum() <= total.on_cpu.sum()
        copied = total.misses.sum() - total.on_cpu.sum() + total.admitted.sum()
        assert total.loads == copied, "nothing is prefetched"
        if miss == "cpu":
            assert total.admitted.sum() > 0 and total.hits.sum() > 0
        found[miss] = result.seconds.tokens_per_s or 0.0
    assert found["auto"] >= 0.97 * max(found["fetch"], found["cpu"])
    assert found["cpu"] > found["fetch"]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="a link and a CPU"):
        ReplaySettings(slots=1, record_bytes=1, hardware=Hardware("x", 1.0, None, 1.0), miss="cpu")
    with pytest.raises(ValueError, match="without a disk"):
        ReplaySettings(slots=1, record_bytes=1, hardware=HARDWARE["rtx4060"], miss="auto")
    with pytest.raises(ValueError, match="slot"):
        ReplaySettings(slots=0)
    with pytest.raises(ValueError, match="size of a record"):
        ReplaySettings(slots=1, hardware=Hardware("x", 1.0, None, 1.0))
    with pytest.raises(PolicyError, match="unknown policy"):
        run(random_events(3), policy="mru", slots=3)
    with pytest.raises(PredictorError, match="unknown predictor"):
        run(random_events(3), predictor="tea-leaves", slots=3)


def test_an_empty_trace_gives_nothing() -> None:
    result = run(events_of([]), slots=3)
    assert result.hit_rate is None and result.layers == ()


@pytest.mark.parametrize("miss", ["fetch", "auto"])
def test_guesses_over_the_link(miss: str) -> None:
    """What is foretold well makes tokens faster, and what is foretold badly no slower; nothing beats the least time."""
    habits = replace(MODELS["qwen3-30b-a3b"], layers=4, requests=1, tokens=96, topic=1.9, overlap=0.56)
    events = trace_events(synthetic_trace(habits))
    hardware = replace(HARDWARE["rtx4090"], disk_bytes_per_s=None, dense_s=4 * 77 * 4e-6)
    found = {}
    for predictor in (None, "layer-markov", "oracle:0.2", "oracle:0.75", "oracle:0.9"):
        result = run(
            events, policy="ewma", scope="global", slots=128, record_bytes=2654208, hardware=hardware, miss=miss,
            predictor=predictor,
        )  # fmt: skip
        seconds = result.seconds
        assert seconds is not None and seconds.compute <= seconds.least <= seconds.total * (1 + 1e-9)
        found[predictor] = seconds.total
    assert found["oracle:0.9"] < found["oracle:0.75"] < found[None]
    assert found["layer-markov"] <= found[None] / 0.98 and found["oracle:0.2"] <= found[None] / 0.98
