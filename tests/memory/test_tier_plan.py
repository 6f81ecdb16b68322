"""The plan of VRAM, RAM and disk: rows add up, budgets are kept, and an error names a budget that works."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.machines import load_machine
from offload.config import parse_size
from offload.errors import BudgetError
from offload.memory.estimate import Work, estimate
from offload.memory.hit_rates import expected_hit_rate
from offload.memory.plan import Baseline, ModelSizes
from offload.memory.tier_plan import Asked, TierPlan, Vram, make_tier_plan, ram_fixed, vram_fixed

MIB, GIB = 2**20, 2**30
SIZES = st.builds(
    ModelSizes,
    skeleton_bytes=st.integers(0, 30 * GIB),
    kv_bytes=st.integers(0, 20 * GIB),
    activation_bytes=st.integers(0, 4 * GIB),
    slot_bytes=st.integers(1, 100_000).map(lambda blocks: blocks * 4096),
    num_experts=st.integers(1, 20_000),
    context_tokens=st.integers(2, 200_000),
    graph_bytes=st.just(0) | st.integers(0, GIB),
)
BUDGETS = st.none() | st.integers(1, 300 * GIB)
BASELINE = Baseline(400 * MIB, 100 * MIB)
QWEN = ModelSizes(int(1.45 * GIB), 384 * MIB, 172 * MIB, 2654208, 48 * 128, 4096)


@given(SIZES, BUDGETS, BUDGETS, st.none() | st.floats(0.001, 1), st.booleans(), st.integers(1, 200), st.integers(1, 9))
def test_any_budgets(
    sizes: ModelSizes, vram: int | None, ram: int | None, share: float | None, exclusive: bool, gib: int, staging: int
) -> None:
    card = Vram(gib * GIB, gib * GIB - GIB // 2, 512 * MIB)
    asked = Asked(vram, ram, share, exclusive)

    def plan(wish: Asked) -> TierPlan:
        return make_tier_plan("m", "cuda", sizes, BASELINE, 64 * GIB, card, staging, wish)

    try:
        made = plan(asked)
    except BudgetError as error:
        assert "\n" not in str(error)
        found = re.search(r"the smallest that works is (--\w+) (\w+)", str(error))
        if found is not None:
            flag, size = found[1].removeprefix("--"), parse_size(found[2], found[1])
            if flag == "ram" or size <= card.total:
                try:
                    plan(replace(asked, **{flag: size}))
                except BudgetError as other:  # the other budget is too small as well
                    assert found[1] + " " not in str(other).split(":")[0]
        return
    assert sum(size for _, size, _ in made.vram_rows()) == made.vram_budget <= card.total
    assert sum(size for _, size, _ in made.ram_rows()) == made.budget
    assert all(size >= 0 for _, size, _ in made.rows())
    assert 1 <= made.slots <= sizes.num_experts and 0 <= made.host_slots <= sizes.num_experts
    assert not exclusive or made.slots + made.host_slots <= sizes.num_experts, "no record needs two places"
    assert (vram is None) or made.vram_budget == vram
    assert (ram is None) or made.budget == ram
    assert vram is not None or made.vram_budget <= card.free * 9 // 10
    if share is not None:
        assert made.slots <= max(1, round(sizes.num_experts * share))
    assert plan(asked) == made
    data = json.loads(json.dumps(made.to_json()))
    assert sum(data["vram_bytes"].values()) == data["vram_budget_bytes"]
    assert sum(data["bytes"].values()) == data["ram_budget_bytes"]


def test_what_is_said() -> None:
    card = Vram(8 * GIB, 8 * GIB, 512 * MIB)
    plan = make_tier_plan("org/qwen", "cuda:0", QWEN, BASELINE, 28 * GIB, card, 5, Asked())
    first, second = plan.summary()
    assert "7.20 GiB of VRAM (--vram auto)" in first and "819 MiB of VRAM are left to the desktop" in first
    assert second.startswith(f"{plan.slots} expert slots hold 30% of the experts, 6144 buffers in RAM 100%")
    assert second.endswith("nothing is read from disk while answering")
    small = make_tier_plan("org/qwen", "cuda:0", QWEN, BASELINE, 28 * GIB, card, 5, Asked(4 * GIB, 4 * GIB, None, True))
    assert small.in_memory == pytest.approx((small.slots + small.host_slots) / 6144)
    assert "(none of them twice)" in small.summary()[1]
    labels = [label for label, _, _ in plan.rows()]
    assert labels[0] == "VRAM: context" and labels[-1] == "disk: experts" and "RAM: host tier" in labels


def test_budgets_that_cannot_work() -> None:
    card = Vram(8 * GIB, 8 * GIB, 512 * MIB)
    smallest = vram_fixed(QWEN, card) + QWEN.slot_bytes
    with pytest.raises(BudgetError, match=rf"--vram 1.00 GiB is too small .* is --vram {-(-smallest // MIB)}MiB"):
        make_tier_plan("m", "cuda", QWEN, BASELINE, 28 * GIB, card, 5, Asked(vram=GIB))
    least = -(-ram_fixed(QWEN, BASELINE, 5) // MIB)
    with pytest.raises(BudgetError, match=rf"the smallest that works is --ram {least}MiB"):
        make_tier_plan("m", "cuda", QWEN, BASELINE, 28 * GIB, card, 5, Asked(ram=100 * MIB))
    with pytest.raises(BudgetError, match=r"cuda has 8\.00 GiB"):
        make_tier_plan("m", "cuda", QWEN, BASELINE, 28 * GIB, card, 5, Asked(vram=9 * GIB))
    with pytest.raises(BudgetError, match=r"of VRAM at 4096 tokens .* smaller --ctx"):
        make_tier_plan("m", "cuda", QWEN, BASELINE, 28 * GIB, replace(card, free=2 * GIB), 5, Asked())
    assert make_tier_plan("m", "cuda", QWEN, BASELINE, 0, card, 5, Asked(ram=least * MIB)).host_slots == 0


def plan_on(name: str, **asked: object) -> TierPlan:
    machine = load_machine(name)
    card = Vram(machine.vram_bytes, machine.vram_bytes, 512 * MIB)
    return make_tier_plan("m", name, QWEN, BASELINE, machine.ram_bytes, card, 5, Asked(**asked))  # type: ignore[arg-type]


def test_the_lane_that_holds_it_back() -> None:
    work = Work(48, 8)
    small, large = load_machine("rtx4060"), load_machine("rtx4090")
    assert estimate(plan_on("rtx4060"), work, small).bottleneck == "link"
    assert estimate(plan_on("rtx4060", ram=3 * GIB), work, small).bottleneck == "disk"
    whole = estimate(plan_on("rtx4090"), work, large)
    assert whole.bottleneck == "launches" and whole.link_s == whole.disk_s == 0
    assert "--graphs on" in whole.summary()[1]
    graphs = estimate(replace(plan_on("rtx4090"), sizes=replace(QWEN, graph_bytes=GIB)), work, large)
    assert graphs.launches_s < whole.launches_s / 10 and graphs.bottleneck == "device memory"
    thin = estimate(plan_on("rtx4060", ram=3 * GIB, residency=0.05), work, small)
    assert thin.tokens_per_s < estimate(plan_on("rtx4060", ram=3 * GIB), work, small).tokens_per_s < whole.tokens_per_s
    assert "--ram" in thin.summary()[1]
    assert thin.to_json()["bottleneck"] == "disk"
    exclusive = plan_on("rtx4060", ram=6 * GIB, exclusive=True)
    assert estimate(exclusive, work, small).disk_s < estimate(plan_on("rtx4060", ram=6 * GIB), work, small).disk_s


@pytest.mark.parametrize("machine", ["rtx3060", "rtx4060", "rtx5090", "laptop-pcie3"])
@pytest.mark.parametrize("asked", [{"residency": 0.125}, {"residency": 0.5}, {"residency": 0.2, "ram": 6 * GIB}])
def test_ways_of_misses(machine: str, asked: dict[str, float]) -> None:
    work, rates, plan = Work(48, 8), load_machine(machine), plan_on(machine, **asked)
    fetch, cpu, auto = (estimate(plan, work, rates, miss) for miss in ("fetch", "cpu", "auto"))
    assert fetch.cpu_s == 0 and fetch.misses_s == pytest.approx(fetch.link_s)
    assert cpu.cpu_s >= auto.cpu_s and cpu.link_s <= auto.link_s <= fetch.link_s
    assert auto.tokens_per_s >= 0.97 * max(fetch.tokens_per_s, cpu.tokens_per_s)
    assert (cpu.disk_s, auto.hit_rate) == (fetch.disk_s, fetch.hit_rate)
    if plan.in_memory == 1:
        assert cpu.link_s == pytest.approx(0)
    assert "experts on the CPU" in auto.summary()[0] and auto.to_json()["miss"] == "auto"


@given(st.floats(0, 1), st.floats(0, 1))
def test_more_slots_never_hit_less(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 0 <= expected_hit_rate(low) <= expected_hit_rate(high) <= 1
