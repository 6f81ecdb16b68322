"""The memory plan: a pure function whose rows add up to the budget, for any model and any machine."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from offload.config import parse_size
from offload.errors import BudgetError
from offload.memory.plan import MARGIN_BYTES, Baseline, ModelSizes, Plan, make_plan

MIB, GIB = 2**20, 2**30
SIZES = st.builds(
    ModelSizes,
    skeleton_bytes=st.integers(0, 30 * GIB),
    kv_bytes=st.integers(0, 20 * GIB),
    activation_bytes=st.integers(0, 4 * GIB),
    slot_bytes=st.integers(1, 100_000).map(lambda blocks: blocks * 4096),
    num_experts=st.integers(1, 20_000),
    context_tokens=st.integers(2, 200_000),
)
BASELINES = st.builds(Baseline, anonymous=st.integers(0, 2 * GIB), files=st.integers(0, GIB))
RESIDENCY = st.none() | st.floats(0.001, 1)
BUDGETS = st.integers(1, 300 * GIB)


def fixed_bytes(sizes: ModelSizes, baseline: Baseline) -> int:
    model = sizes.skeleton_bytes + sizes.kv_bytes + sizes.activation_bytes
    return model + baseline.anonymous + baseline.files + MARGIN_BYTES


def check(plan: Plan) -> None:
    """What must hold of every plan."""
    assert sum(size for _, size, _ in plan.rows()) == plan.budget
    assert all(size >= 0 for _, size, _ in plan.rows())
    assert 1 <= plan.slots <= plan.sizes.num_experts
    assert 0 < plan.residency <= 1
    anonymous = plan.budget - plan.baseline.files - MARGIN_BYTES - plan.rows()[-1][1]
    assert plan.anonymous_bytes == anonymous


@given(SIZES, BASELINES, BUDGETS, RESIDENCY)
def test_any_budget(sizes: ModelSizes, baseline: Baseline, ram: int, residency: float | None) -> None:
    smallest = fixed_bytes(sizes, baseline) + sizes.slot_bytes
    if ram < smallest:
        with pytest.raises(BudgetError):
            make_plan("m", "cpu", sizes, baseline, 0, ram, residency)
        return
    plan = make_plan("m", "cpu", sizes, baseline, 0, ram, residency)
    check(plan)
    assert (plan.budget, plan.budget_chosen) == (ram, True)
    if residency is None:
        unused = plan.rows()[-1][1]
        assert plan.slots == sizes.num_experts or unused < sizes.slot_bytes, "what is left becomes slots"
    assert make_plan("m", "cpu", sizes, baseline, 0, ram, residency) == plan


@given(SIZES, BASELINES, BUDGETS, BUDGETS, RESIDENCY)
def test_more_budget_never_gives_fewer_slots(
    sizes: ModelSizes, baseline: Baseline, one: int, other: int, residency: float | None
) -> None:
    less, more = (
        make_plan("m", "cpu", sizes, baseline, 0, fixed_bytes(sizes, baseline) + sizes.slot_bytes + extra, residency)
        for extra in sorted((one, other))
    )
    assert less.slots <= more.slots


@given(SIZES, BASELINES, BUDGETS, st.floats(0.001, 1))
def test_residency_is_a_cap(sizes: ModelSizes, baseline: Baseline, extra: int, residency: float) -> None:
    ram = fixed_bytes(sizes, baseline) + sizes.slot_bytes + extra
    capped = make_plan("m", "cpu", sizes, baseline, 0, ram, residency)
    free = make_plan("m", "cpu", sizes, baseline, 0, ram)
    assert capped.slots == min(free.slots, max(1, round(sizes.num_experts * residency)))
    assert abs(capped.slots - sizes.num_experts * residency) <= 1 or capped.slots == free.slots


@given(SIZES, BASELINES, st.integers(0, 2 * 10**12), RESIDENCY)
def test_automatic_budget(sizes: ModelSizes, baseline: Baseline, available: int, residency: float | None) -> None:
    ceiling = (available + baseline.anonymous + baseline.files) * 9 // 10
    if ceiling < fixed_bytes(sizes, baseline) + sizes.slot_bytes:
        with pytest.raises(BudgetError, match=r"needs at least \d+MiB at .* close other programs"):
            make_plan("m", "cpu", sizes, baseline, available, None, residency)
        return
    plan = make_plan("m", "cpu", sizes, baseline, available, None, residency)
    check(plan)
    assert plan.budget <= ceiling
    assert not plan.budget_chosen
    if plan.slots == sizes.num_experts:
        assert plan.rows()[-1][1] == 0, "no more than the model can use"


@given(SIZES, BASELINES, st.integers(1, 64 * MIB))
def test_the_smallest_budget_that_an_error_names_works(sizes: ModelSizes, baseline: Baseline, ram: int) -> None:
    assume(ram < fixed_bytes(sizes, baseline) + sizes.slot_bytes)
    with pytest.raises(BudgetError) as caught:
        make_plan("org/model", "cpu", sizes, baseline, 0, ram)
    message = str(caught.value)
    assert message.startswith("--ram ")
    assert "\n" not in message
    found = re.search(r"the smallest that works is --ram (\w+)", message)
    assert found is not None
    smallest = parse_size(found.group(1), "--ram")
    check(make_plan("org/model", "cpu", sizes, baseline, 0, smallest))
    with pytest.raises(BudgetError):
        make_plan("org/model", "cpu", sizes, baseline, 0, smallest - MIB)


@pytest.mark.parametrize("vram_gib", [8, 12, 16, 24, 48, 80])
@pytest.mark.parametrize(
    ("skeleton_gib", "slot_mib", "experts"),
    [(1.4, 9, 48 * 128), (2.3, 13, 24 * 32), (17, 42, 58 * 256), (3.2, 336, 32 * 8)],
    ids=["qwen3-30b", "gpt-oss-20b", "deepseek-v3", "mixtral-8x7b"],
)
def test_known_machines_and_models(vram_gib: int, skeleton_gib: float, slot_mib: int, experts: int) -> None:
    """The function is the same for any device; the rows tell what a person would work out by hand."""
    sizes = ModelSizes(int(skeleton_gib * GIB), GIB, GIB // 4, slot_mib * MIB, experts, 8192)
    baseline = Baseline(GIB // 2, GIB // 4)
    rest = vram_gib * GIB - fixed_bytes(sizes, baseline)
    if rest < sizes.slot_bytes:
        with pytest.raises(BudgetError):
            make_plan("m", "cuda", sizes, baseline, 0, vram_gib * GIB)
        return
    plan = make_plan("m", "cuda", sizes, baseline, 0, vram_gib * GIB)
    check(plan)
    assert plan.slots == min(experts, rest // (slot_mib * MIB))
    assert plan.device == "cuda"


SIZES_OF_ONE = ModelSizes(100 * MIB, 20 * MIB, 10 * MIB, MIB, 64, 4096)


def test_what_is_said() -> None:
    plan = make_plan("org/model", "cpu", SIZES_OF_ONE, Baseline(200 * MIB, 300 * MIB), 0, 710 * MIB)
    assert plan.slots == 32
    first, second = plan.summary()
    assert first == "org/model on cpu: a budget of 710 MiB (--ram) for the whole process"
    assert second == "32 expert slots hold 50% of the experts"
    rows = {label: (size, remark) for label, size, remark in plan.rows()}
    assert rows["expert slots"] == (32 * MIB, "32 of 64 experts (50%), 1.0 MiB each")
    assert rows["KV cache"] == (20 * MIB, "4096 tokens (--ctx)")
    assert rows["skeleton"][0] == 100 * MIB
    whole = make_plan("org/model", "cpu", SIZES_OF_ONE, Baseline(200 * MIB, 300 * MIB), 10**12)
    assert "(--ram auto)" in whole.summary()[0]
    assert whole.summary()[1].endswith("all experts fit, nothing is read while answering")
    half = make_plan("org/model", "cpu", SIZES_OF_ONE, Baseline(0, 0), 10**12, None, 0.5)
    assert (half.slots, half.rows()[-1][1]) == (32, 0)


@given(SIZES, BASELINES)
def test_json(sizes: ModelSizes, baseline: Baseline) -> None:
    plan = make_plan("m", "cpu", sizes, baseline, 0, fixed_bytes(sizes, baseline) + 2 * sizes.slot_bytes)
    data = json.loads(json.dumps(plan.to_json()))
    assert data == plan.to_json()
    assert sum(data["bytes"].values()) == data["ram_budget_bytes"] == plan.budget
    assert data["expert_slots"] * data["slot_bytes"] == data["bytes"]["expert_slots"]
    assert data["bytes"]["kv_cache"] == sizes.kv_bytes
    assert data["bytes"]["libraries"] == baseline.files
    assert data["anonymous_bytes"] == plan.anonymous_bytes
    assert data["residency"] == data["expert_slots"] / data["experts"]


def test_plan_is_frozen_and_pure() -> None:
    plan = make_plan("m", "cpu", SIZES_OF_ONE, Baseline(0, 0), 0, 300 * MIB)
    with pytest.raises(AttributeError):
        plan.slots = 3  # type: ignore[misc]
    assert replace(plan) == plan


def test_quantised_experts_stage_their_products_in_float32() -> None:
    from transformers import Qwen3MoeConfig

    from offload.memory.activations import staged_bytes

    config = Qwen3MoeConfig(hidden_size=1024, num_experts_per_tok=8, moe_intermediate_size=256)
    few, many = (staged_bytes(config, 2, 4096, chunk) for chunk in (1, 512))
    assert many - few >= 511 * 8 * 1024 * 2, "two more bytes for each value of each product"
    assert staged_bytes(config, 4, 4096, 512) < many
    assert staged_bytes(config, 2, 64, 512) == staged_bytes(config, 2, 64, 64), "the context bounds the chunk"
