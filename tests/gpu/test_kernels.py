"""The grouped kernels on a real card: right at the size of real experts, and how fast.

tests/compute/test_grouped.py has the odd cases; where there is a card, it runs them there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cache.keys import ExpertKey
from offload.checkpoint.formats import Weights, get_format
from offload.compute.base import ExpertCompute
from offload.compute.choose import expert_compute
from offload.compute.grouped import load_grouped
from offload.compute.matrix import QuantizedMatrix
from offload.compute.product import Products
from tests.engines import open_tiny

HIDDEN, INNER, EXPERTS, TOP_K = 2048, 768, 64, 8  # Qwen3-30B-A3B's, with half of its experts
FORMATS = ["int4", "int4-g32", "int4-g128", "int8", "mixed", "native"]
DTYPE = torch.bfloat16


class Module:
    num_experts = EXPERTS
    has_gate, has_bias, is_transposed, has_post_expert_norm = True, False, False, False

    def _apply_gate(self, states: torch.Tensor) -> torch.Tensor:
        gate, up = states.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up


def random_experts(name: str) -> dict[ExpertKey, Weights]:
    chosen = get_format(name)
    layout = chosen.layout({"gate_up_proj": ((2 * INNER, HIDDEN), DTYPE), "down_proj": ((HIDDEN, INNER), DTYPE)})
    slots = torch.empty(EXPERTS, layout.record_bytes, dtype=torch.uint8, device="cuda")
    record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
    for expert in range(EXPERTS):
        if expert < 4:  # encoding takes a while: the others are these again
            matrices = {"gate_up_proj": torch.randn(2 * INNER, HIDDEN), "down_proj": torch.randn(HIDDEN, INNER)}
            chosen.encode(layout, {name: (part * 0.02).to(DTYPE) for name, part in matrices.items()}, record)
            slots[expert] = record.cuda()
        else:
            slots[expert] = slots[expert % 4]
    return {ExpertKey(0, expert): chosen.views(layout, slots[expert]) for expert in range(EXPERTS)}


def weight_bytes(weights: Weights) -> int:
    sizes = 0
    for weight in weights.values():
        parts = (weight.codes, weight.params) if isinstance(weight, QuantizedMatrix) else (weight,)
        sizes += sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
    return sizes


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    work()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / repeats


@pytest.mark.parametrize("name", FORMATS)
def test_grouped_against_one_by_one(name: str, report: list[str]) -> None:
    reasons: list[str] = []
    kernels = load_grouped(torch.device("cuda", 0), get_format(name), DTYPE, reasons.append)
    assert kernels is not None, reasons
    weights = random_experts(name)
    computes = [expert_compute(get_format(name), Products(None, 0), grouped=found) for found in (kernels, None)]
    for tokens in (1, 16, 512):
        hidden = torch.randn(tokens, HIDDEN, device="cuda", dtype=DTYPE)
        chosen = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).cuda()
        routed = torch.rand(tokens, TOP_K, device="cuda", dtype=DTYPE)

        def event(
            compute: ExpertCompute,
            given: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = (hidden, chosen, routed),
        ) -> torch.Tensor:
            begun = compute.begin(Module(), *given, weights.__getitem__)
            begun.compute([ExpertKey(0, expert) for expert in begun.experts])
            return begun.result()

        ours, theirs = (event(compute) for compute in computes)
        assert torch.equal(ours, event(computes[0])), "the same every time"
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        took, took_alone = (milliseconds(lambda compute=compute: event(compute), 10) for compute in computes)
        moved = weight_bytes(weights[ExpertKey(0, 0)]) * len(set(chosen.flatten().tolist()))
        report.append(
            f"{name}, {tokens} tokens: an event in {took:.3f} ms ({moved / took / 1e6:.0f} GB/s of weights), "
            f"one by one {took_alone:.3f} ms; differs by {error:.1e}"
        )
        assert error < 0.03


@pytest.mark.parametrize("name", ["int4", "native"])
def test_the_engine_takes_them(name: str, checkpoint: Path, packs: Path, report: list[str]) -> None:
    def logits(kernels: str) -> list[torch.Tensor]:
        with open_tiny(checkpoint, packs, device="cuda", format=name, kernels=kernels, residency=1.0) as engine:
            found = [engine._passes.run([3, 9, 27, 81], decode=False), engine._passes.run([5], decode=True)]
            counted = engine._runtime.transfers
            report.append(f"{name}, --kernels {kernels}: {counted.compute_calls / counted.events:.1f} calls per event")
        return found

    for ours, theirs in zip(logits("auto"), logits("torch"), strict=True):
        assert (ours - theirs).abs().max() < 0.03 * theirs.abs().max()
