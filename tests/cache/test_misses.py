"""Where misses are computed: the split has the shortest makespan, and a copy must be repaid."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.keys import ExpertKey
from cache.machines import load_machine, machine_names
from cache.misses import ExpertWork, MissPlanner, MissRates

WORK = ExpertWork(2_654_208, 9.4e6, 4096, 8192)  # Qwen3-30B-A3B in int4


def planner(machine: str = "rtx4060", strategy: str = "auto") -> MissPlanner:
    return MissPlanner(MissRates.of_machine(load_machine(machine)), strategy)


def keys(count: int) -> list[ExpertKey]:
    return [ExpertKey(3, number) for number in range(count)]


def makespan(on_cpu: set[ExpertKey], order: list[ExpertKey], tokens: dict[int, int], rates: MissRates) -> float:
    """One assignment, by the rules that docs/devices.md states; records go over the link in ``order``."""
    everyone = sum(tokens.values())
    cpu = 2 * rates.load_s + everyone * WORK.input_bytes / rates.link_bytes_per_s if on_cpu else 0.0
    for key in on_cpu:
        cpu += max(WORK.record_bytes / rates.host_bytes_per_s, tokens[key.expert] * WORK.flops / rates.host_flops_per_s)
        cpu += tokens[key.expert] * WORK.output_bytes / rates.link_bytes_per_s
    link = device = rates.event_s
    link = 0.0
    fetched = [key for key in order if key not in on_cpu]
    for number, key in enumerate(fetched):
        link += rates.load_s + WORK.record_bytes / rates.link_bytes_per_s
        multiply = tokens[key.expert] * WORK.flops / rates.device_flops_per_s
        device = max(device, link) + max(WORK.record_bytes / rates.device_bytes_per_s, multiply)
        device += rates.event_s if not number else 0.0
    cpu += min(cpu, link) * rates.link_bytes_per_s / rates.host_bytes_per_s
    return max(cpu, device)


@given(
    st.sampled_from(machine_names()),
    st.lists(st.sampled_from([1, 1, 1, 2, 5, 40, 300]), min_size=1, max_size=6),
)
def test_no_assignment_is_much_better(machine: str, counts: list[int]) -> None:
    made, misses = planner(machine), keys(len(counts))
    tokens = dict(enumerate(counts))
    chosen = set(made.on_cpu(misses, tokens, WORK, event_tokens=sum(counts)))
    order = sorted(misses, key=lambda key: -tokens[key.expert])
    every = (set(some) for size in range(len(misses) + 1) for some in itertools.combinations(misses, size))
    best = min(makespan(some, order, tokens, made.rates) for some in every)
    found = makespan(chosen, order, tokens, made.rates)
    assert found <= best * (1.0001 if len(set(counts)) == 1 else 1.15)


def test_few_tokens_stay_and_many_are_fetched() -> None:
    misses = keys(8)
    one = planner().on_cpu(misses, dict.fromkeys(range(8), 1), WORK)
    assert len(one) >= 6, "the CPU reads RAM five times as fast as the link"
    many = planner().on_cpu(misses, dict.fromkeys(range(8), 400), WORK, event_tokens=400)
    assert many == []
    mixed = planner().on_cpu(misses, {number: 500 if number < 4 else 1 for number in range(8)}, WORK, event_tokens=500)
    assert mixed and all(key.expert >= 4 for key in mixed), "those with many tokens go over the link"


def test_a_slow_cpu_leaves_all_to_the_link_and_a_slow_link_all_to_the_cpu() -> None:
    tokens = dict.fromkeys(range(4), 1)
    slow_cpu = MissPlanner(MissRates(25e9, 8e11, 1e14, 1e9, 1e11, 1e-5, 1e-5))
    assert slow_cpu.on_cpu(keys(4), tokens, WORK) == []
    slow_link = MissPlanner(MissRates(1e8, 8e11, 1e14, 6e10, 1e12, 1e-5, 1e-5))
    assert len(slow_link.on_cpu(keys(4), tokens, WORK)) == 4


def test_what_the_link_has_to_do_anyway_counts() -> None:
    tokens = dict.fromkeys(range(6), 1)
    idle = planner("rtx5090").on_cpu(keys(6), tokens, WORK)
    busy = planner("rtx5090").on_cpu(keys(6), tokens, WORK, loading=3)
    assert len(idle) < len(busy)


def test_the_strategies_that_do_not_choose() -> None:
    tokens = dict.fromkeys(range(3), 1000)
    assert planner(strategy="fetch").on_cpu(keys(3), tokens, WORK) == []
    assert planner(strategy="cpu").on_cpu(keys(3), tokens, WORK) == keys(3)
    assert planner().on_cpu([], {}, WORK) == []


def test_of_equals_those_used_most_go_over_the_link() -> None:
    made = planner("rtx5090")
    misses = keys(6)
    hot = {misses[4], misses[2]}
    for _ in range(3):
        made.record_event([*hot])
    fetched = {*misses} - {*made.on_cpu(misses, dict.fromkeys(range(6), 1), WORK)}
    assert 0 < len(fetched) < 6
    assert fetched <= hot or hot <= fetched


@pytest.mark.parametrize("machine", machine_names())
def test_a_copy_must_be_repaid(machine: str) -> None:
    made = planner(machine)
    hot, cold, new = keys(3)
    for _ in range(8):
        made.record_event([hot])
    made.record_event([cold])
    assert made.repays(WORK, hot, cold)
    assert not made.repays(WORK, cold, hot), "it would be used less than what it displaces"
    assert not made.repays(WORK, hot, hot) and not made.repays(WORK, new, cold)
    for _ in range(200):
        made.record_event([new])
    assert not made.repays(WORK, hot, cold), "what was used long ago is not expected back"


def test_a_cpu_as_fast_as_the_device_needs_no_copy() -> None:
    made = MissPlanner(MissRates(1e10, 5e10, 1e14, 6e10, 1e12, 1e-5, 1e-5))
    hot, cold = keys(2)
    for _ in range(8):
        made.record_event([hot])
    assert not made.repays(WORK, hot, cold)
