"""The engine on a real card: right numbers, hard budgets, copies beside kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offload.config import SamplingSettings
from offload.devices import get_device
from offload.engine import Engine
from offload.events import LiveChanges, Notice
from offload.memory.tier_plan import TierPlan
from tests.engines import finish, open_tiny

VARIED = SamplingSettings(temperature=1.2, seed=5, max_new_tokens=24)


def logits_of(engine: Engine) -> list[torch.Tensor]:
    engine.reset()
    return [engine._passes.run([3, 9, 27, 81, 11, 12], decode=False)] + [
        engine._passes.run([token], decode=True) for token in (5, 50, 7)
    ]


def test_the_logits_are_those_of_the_cpu_up_to_rounding(checkpoint: Path, packs: Path, report: list[str]) -> None:
    with open_tiny(checkpoint, packs, device="cpu") as engine:
        expected = logits_of(engine)
    with open_tiny(checkpoint, packs, device="cuda", residency=0.4) as engine:
        found = logits_of(engine)
    worst = max((ours - theirs).abs().max().item() for ours, theirs in zip(found, expected, strict=True))
    report.append(f"{torch.cuda.get_device_name()}: largest difference to the CPU {worst:.2e}")
    assert worst < 1e-3


@pytest.mark.parametrize("tiers", ["inclusive", "exclusive"])
@pytest.mark.parametrize("prefetch", ["off", "next-gate"])
def test_the_logits_do_not_depend_on_the_tiers(tiers: str, prefetch: str, checkpoint: Path, packs: Path) -> None:
    with open_tiny(checkpoint, packs, device="cuda", residency=1.0) as engine:
        expected = logits_of(engine)
    for residency in (0.05, 0.4):
        settings = {"tiers": tiers, "prefetch": prefetch, "residency": residency}
        with open_tiny(checkpoint, packs, device="cuda", **settings) as engine:
            for _ in range(3):
                assert all(torch.equal(a, b) for a, b in zip(logits_of(engine), expected, strict=True))


def test_the_budget_is_hard(checkpoint: Path, packs: Path, report: list[str]) -> None:
    with open_tiny(checkpoint, packs, device="cuda", residency=0.5) as engine:
        finish(engine.generate("Once upon a time", VARIED))
        memory = engine.stats().memory
        assert memory.vram_peak_bytes is not None and memory.vram_budget_bytes is not None
        report.append(f"{memory.vram_peak_bytes / 2**20:.0f} of {memory.vram_budget_bytes / 2**20:.0f} MiB of VRAM")
        assert memory.vram_peak_bytes <= memory.vram_budget_bytes
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(memory.vram_budget_bytes, dtype=torch.uint8, device="cuda")


def test_memory_that_is_refused_costs_slots(checkpoint: Path, packs: Path) -> None:
    with open_tiny(checkpoint, packs, device="cuda", residency=0.5) as engine:
        before = engine.plan.slots

        def refuse(*args: object) -> None:
            hook.remove()
            raise torch.cuda.OutOfMemoryError("as if")

        hook = engine._model.model.layers[2].register_forward_hook(refuse)
        events, done = finish(engine.generate("Once upon a time", VARIED))
        assert done.error is None and engine.plan.slots < before
        assert any(isinstance(event, Notice) for event in events)


def test_budgets_change_between_tokens(checkpoint: Path, packs: Path) -> None:
    with open_tiny(checkpoint, packs, device="cuda", residency=0.5) as engine:
        expected = logits_of(engine)
        for residency in (0.1, 1.0, 0.3):
            engine.change(LiveChanges(residency=residency))
            assert all(torch.equal(a, b) for a, b in zip(logits_of(engine), expected, strict=True))


def test_copies_run_beside_kernels(report: list[str]) -> None:
    size, copies = 8 * 2**20, 64
    device = get_device("cuda")
    arena, host = device.allocate_slots(copies, size), device.allocate_host(copies, size, copies)
    assert host.pinned, "this process may not pin memory (ulimit -l)"
    for buffer in range(copies):
        host.writable(buffer)[:1] = b"x"
    link = device.link(arena, host)
    factor = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def seconds(kernels: int, uploads: int) -> float:
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        fences = [link.upload(slot, slot, size, []) for slot in range(uploads)]
        for _ in range(kernels):
            factor @ factor
        for fence in fences:
            link.join(fence)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000

    seconds(8, copies)
    alone = seconds(0, copies)
    kernels = max(8, int(8 * alone / seconds(8, 0)))
    computing, both = seconds(kernels, 0), seconds(kernels, copies)
    rate = size * copies / alone / 1e9
    report.append(
        f"{rate:.1f} GB/s up; copies {alone * 1e3:.1f} ms, kernels {computing * 1e3:.1f}, both {both * 1e3:.1f}"
    )
    for closing in (arena, host, device):
        closing.close()
    assert both < 0.8 * (alone + computing)


def test_tokens_a_second(checkpoint: Path, packs: Path, report: list[str]) -> None:
    for residency in (0.125, 0.25, 0.5, 1.0):
        with open_tiny(checkpoint, packs, device="cuda", residency=residency) as engine:
            finish(engine.generate("Once upon a time", VARIED))
            _, done = finish(engine.generate("and then", VARIED))
            assert isinstance(engine.plan, TierPlan)
            stats = done.stats
            report.append(
                f"tiny model at {residency:.1%}: {stats.decode_tokens_per_s:.1f} tokens/s, hits "
                f"{stats.experts.hit_rate or 0:.0%}, link stalls {stats.seconds.stall_link or 0:.4f} s"
            )
            assert done.error is None
