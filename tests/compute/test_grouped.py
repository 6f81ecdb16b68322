"""The grouped kernels against experts that torch computes one by one: in Triton's interpreter, or on a card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch

from cache.keys import ExpertKey
from offload.checkpoint.formats import Weights, get_format
from offload.compute.base import ExpertCompute
from offload.compute.choose import expert_compute
from offload.compute.grouped import GroupedKernels, load_grouped
from offload.compute.grouped.launches import Launch, combination, row_tile
from offload.compute.grouped_experts import GroupedExperts, summands
from offload.compute.native_experts import NativeExperts
from offload.compute.product import Products

HIDDEN, INNER, EXPERTS, TOP_K = 96, 40, 6, 3
# Of the largest value. The interpreter cuts off where a card rounds.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 4e-2}


class Module:
    """What the experts functions ask of a module."""

    num_experts = EXPERTS

    def __init__(self, *, gate: bool = True, bias: bool = False, transposed: bool = False, norm: bool = False) -> None:
        self.has_gate, self.has_bias, self.is_transposed, self.has_post_expert_norm = gate, bias, transposed, norm
        self.act_fn = torch.nn.functional.silu

    def _apply_gate(self, states: torch.Tensor) -> torch.Tensor:
        gate, up = states.chunk(2, -1)
        return self.act_fn(gate) * up  # type: ignore[no-any-return]

    def post_expert_norm(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(states, states.shape[-1:])


def weights_on(device: torch.device, module: Module, name: str, dtype: torch.dtype) -> dict[ExpertKey, Weights]:
    """Random experts of a format, as views into slots one behind the other."""
    random = torch.Generator().manual_seed(1)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    outer = INNER * (2 if module.has_gate else 1)
    shapes: dict[str, tuple[int, ...]] = {first: (outer, HIDDEN), "down_proj": (HIDDEN, INNER)}
    if module.is_transposed:
        shapes = {matrix: shape[::-1] for matrix, shape in shapes.items()}
    if module.has_bias:
        shapes |= {f"{first}_bias": (outer,), "down_proj_bias": (HIDDEN,)}
    chosen = get_format(name)
    transposed = frozenset(shapes if module.is_transposed else ())
    layout = chosen.layout({tensor: (shape, dtype) for tensor, shape in shapes.items()}, transposed)
    arena = torch.full((EXPERTS, layout.record_bytes), 0xFF, dtype=torch.uint8)  # nothing beside the weights may count
    for record in arena:
        tensors = {tensor: torch.randn(shape, generator=random).to(dtype) for tensor, shape in shapes.items()}
        chosen.encode(layout, tensors, record, transposed)
    arena = arena.to(device)
    return {ExpertKey(0, expert): chosen.views(layout, arena[expert]) for expert in range(EXPERTS)}


def routing(device: torch.device, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, choices (some of them of no expert) and weights."""
    random = torch.Generator().manual_seed(tokens)
    chosen = torch.stack([torch.randperm(EXPERTS + 1, generator=random)[:TOP_K] for _ in range(tokens)])
    states = torch.randn(tokens, HIDDEN, generator=random).to(dtype)
    return states.to(device), chosen.to(device), torch.rand(tokens, TOP_K, generator=random).to(device, dtype)


def computed(
    compute: ExpertCompute,
    module: Module,
    weights: dict[ExpertKey, Weights],
    event: tuple[torch.Tensor, ...],
    cut: Any = lambda experts: [experts],
) -> tuple[torch.Tensor, int]:
    """The event's result, its experts computed in the parts that ``cut`` makes of them; and the calls it took."""
    begun = compute.begin(module, *event, weights.__getitem__)
    for part in cut(begun.experts):
        begun.compute([ExpertKey(0, expert) for expert in part])
    return begun.result(), begun.calls


def one_by_one(experts: Sequence[int]) -> Iterable[Sequence[int]]:
    return [[expert] for expert in reversed(experts)]


PLAIN, NO_GATE, BIASED, NORMED = Module(), Module(gate=False), Module(bias=True, transposed=True), Module(norm=True)


@pytest.mark.parametrize(
    ("name", "dtype", "module"),
    [
        ("int4", torch.bfloat16, PLAIN),
        ("int4-g32", torch.float16, NO_GATE),
        ("int4-g128", torch.float32, BIASED),
        ("int8", torch.bfloat16, BIASED),
        ("mixed", torch.float32, NORMED),
        ("native", torch.bfloat16, PLAIN),
        ("native", torch.float16, BIASED),
        ("native", torch.float32, NORMED),
    ],
)
def test_grouped_is_one_by_one(name: str, dtype: torch.dtype, module: Module, grouped: GroupedKernels) -> None:
    weights = weights_on(grouped.device, module, name, dtype)
    reference = expert_compute(get_format(name), Products(None, 0))
    ours = expert_compute(get_format(name), Products(None, 0), grouped=grouped)
    assert isinstance(ours, GroupedExperts)
    for tokens in (1, 50 if name == "int4" else 7):  # 50: tiles of 64 rows
        event = routing(grouped.device, tokens, dtype)
        expected, _ = computed(reference, module, weights, event)
        found, calls = computed(ours, module, weights, event)
        assert found.dtype == dtype
        error = (found - expected).abs().max() / expected.abs().max()
        assert error < TOLERANCE[dtype], f"{tokens} tokens"
        assert calls == 2, "one launch for each product"


@pytest.mark.parametrize("name", ["int4", "native"])
def test_the_result_does_not_depend_on_who_shares_a_launch(name: str, grouped: GroupedKernels) -> None:
    weights = weights_on(grouped.device, PLAIN, name, torch.float32)
    compute = GroupedExperts(grouped, native=name == "native")
    for tokens in (1, 9):
        event = routing(grouped.device, tokens, torch.float32)
        together, _ = computed(compute, PLAIN, weights, event)
        alone, calls = computed(compute, PLAIN, weights, event, one_by_one)
        assert torch.equal(together, alone)
        assert calls == 2 * len(set(event[1].flatten().tolist()) - {EXPERTS})


@pytest.mark.parametrize("name", ["int4", "native"])
def test_products_from_elsewhere_are_taken(name: str, grouped: GroupedKernels) -> None:
    """As of an event of which the CPU computes a part: with its own routing, each weight 1."""
    weights = weights_on(grouped.device, NORMED, name, torch.float32)
    reference = expert_compute(get_format(name), Products(None, 0))
    for tokens in (1, 9):
        states, chosen, routed = event = routing(grouped.device, tokens, torch.float32)
        expected, _ = computed(reference, NORMED, weights, event)
        begun = GroupedExperts(grouped, native=name == "native").begin(NORMED, *event, weights.__getitem__)
        here, there = begun.experts[::2], begun.experts[1::2]
        nobody = torch.where(torch.isin(chosen, torch.tensor(there, device=grouped.device)), chosen, EXPERTS)
        other = reference.begin(NORMED, states, nobody, torch.ones_like(routed), weights.__getitem__)
        assert list(other.experts) == there
        begun.compute([ExpertKey(0, expert) for expert in here])
        other.compute([ExpertKey(0, expert) for expert in there])
        for expert in there:
            begun.accept(expert, other.products(expert))
        assert (begun.result() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_calls_are_cut_to_what_the_plan_counts(grouped: GroupedKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_on(grouped.device, PLAIN, "native", torch.float32)
    compute = GroupedExperts(grouped, native=True)
    event = routing(grouped.device, 12, torch.float32)
    whole, calls = computed(compute, PLAIN, weights, event)
    monkeypatch.setattr("offload.compute.grouped_experts.CALL_ROWS", 1)
    rows: list[int] = []
    run = grouped.run

    def noting(launch: Launch) -> None:
        rows.append(len(launch.arguments["output"]))
        run(launch)

    monkeypatch.setattr(grouped, "run", noting)
    parts, more_calls = computed(compute, PLAIN, weights, event)
    assert torch.equal(parts, whole)
    assert calls == 2 < more_calls
    assert max(rows[0:-1:2]) <= 12, "states between the products, for as many rows as there are tokens"


@pytest.mark.parametrize("tokens", [1, 3])
def test_tokens_without_experts_and_experts_chosen_twice(tokens: int, grouped: GroupedKernels) -> None:
    weights = weights_on(grouped.device, PLAIN, "native", torch.float32)
    states, _, routed = routing(grouped.device, tokens, torch.float32)
    for choice in ([2, 5, 2], [EXPERTS, EXPERTS, 4], [EXPERTS] * 3):
        event = (states, torch.tensor([choice] * tokens, device=grouped.device), routed)
        expected, _ = computed(NativeExperts(), PLAIN, weights, event, lambda experts: [experts] if experts else [])
        found, _ = computed(
            GroupedExperts(grouped, native=True), PLAIN, weights, event, lambda experts: [experts] if experts else []
        )
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert found.any() == (choice[2] != EXPERTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_are_those_of_index_add(dtype: torch.dtype, grouped: GroupedKernels) -> None:
    """Bit for bit, in ascending order of expert."""
    if grouped.interpreted and dtype is not torch.float32:
        pytest.skip("Triton's interpreter cuts off where a card rounds")
    _, chosen, routed = routing(torch.device("cpu"), 11, dtype)
    flat = chosen.reshape(-1)
    order = torch.argsort(flat, stable=True)
    order = order[flat[order] < EXPERTS]
    products = torch.randn(len(order), 600).to(dtype)
    expected = torch.zeros(11, 600, dtype=dtype)
    expected.index_add_(0, order // TOP_K, products * routed.reshape(-1)[order, None])
    table = grouped.upload(summands(order // TOP_K, order % TOP_K, 11, TOP_K))
    found = torch.empty(11, 600, dtype=dtype, device=grouped.device)
    grouped.run(combination(products.to(grouped.device), routed.to(grouped.device), table, found, dtype, dtype))
    assert torch.equal(found.cpu(), expected)


def test_tiles_follow_from_the_routing() -> None:
    assert row_tile(rows=128, experts=8) == 16
    assert row_tile(rows=129, experts=8) == 64


# --- whether they work at all -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int4", "int8", "native"])
def test_kernels_that_work_are_loaded(name: str, grouped: GroupedKernels) -> None:
    reasons: list[str] = []
    assert load_grouped(grouped.device, get_format(name), torch.bfloat16, reasons.append) is not None, reasons
    assert not reasons


def test_kernels_that_err_are_not(grouped: GroupedKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    run = GroupedKernels.run

    def wrong(self: GroupedKernels, launch: Launch) -> None:
        run(self, launch)
        if launch.kernel == "combine":
            launch.arguments["output"][0, 7] *= 3

    monkeypatch.setattr(GroupedKernels, "run", wrong)
    reasons: list[str] = []
    assert load_grouped(grouped.device, get_format("int8"), torch.float32, reasons.append) is None
    assert "on this card" in reasons[0]


def test_kernels_that_write_nothing_are_not(grouped: GroupedKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupedKernels, "run", lambda self, launch: None)
    reasons: list[str] = []
    assert load_grouped(grouped.device, get_format("int8"), torch.float32, reasons.append) is None
    assert reasons == ["they err by nan% on this card"]


def test_a_compiler_that_fails_is_told(grouped: GroupedKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: GroupedKernels, launch: Launch) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(GroupedKernels, "run", fails)
    reasons: list[str] = []
    assert load_grouped(grouped.device, get_format("int8"), torch.float32, reasons.append) is None
    assert reasons == ["RuntimeError: Failed to find C compiler. Please specify via CC"]


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    reasons: list[str] = []
    assert load_grouped(torch.device("cpu"), get_format("int4"), torch.bfloat16, reasons.append) is None
    assert reasons[0].startswith("Triton is missing") and reasons[0].endswith("pip install triton")
