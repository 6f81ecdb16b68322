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
from offload.memory.tiers import TieredLoads
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
        settings = {"tiers": tiers, "prefetch": prefetch, "residency": residency, "miss": "fetch"}
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
    with open_tiny(checkpoint, packs, device="cuda", residency=0.5, miss="fetch") as engine:
        expected = logits_of(engine)
        for residency in (0.1, 1.0, 0.3):
            engine.change(LiveChanges(residency=residency))
            assert all(torch.equal(a, b) for a, b in zip(logits_of(engine), expected, strict=True))


@pytest.mark.parametrize("format", ["native", "int4"])
def test_the_ways_of_misses_give_the_same_numbers(
    format: str, checkpoint: Path, packs: Path, report: list[str]
) -> None:
    """All in RAM: what the CPU computes differs from the card in the last bits; ``fetch`` leaves it nothing."""
    settings = {"device": "cuda", "residency": 0.3, "format": format}
    with open_tiny(checkpoint, packs, miss="fetch", **settings) as engine:
        expected = logits_of(engine)
        fetched = finish(engine.generate("Once upon a time", VARIED))[1].stats
    assert fetched.experts.computed_on_cpu == 0 == fetched.bytes.not_moved and fetched.experts.misses > 0
    for miss in ("cpu", "auto"):
        with open_tiny(checkpoint, packs, miss=miss, **settings) as engine:
            found = logits_of(engine)
            stats = finish(engine.generate("Once upon a time", VARIED))[1].stats
        worst = max((ours - theirs).abs().max().item() for ours, theirs in zip(found, expected, strict=True))
        report.append(
            f"{format}, --miss {miss}: differs by {worst:.1e}; {stats.experts.computed_on_cpu} of "
            f"{stats.experts.misses} misses on the CPU, {stats.bytes.not_moved} bytes not moved"
        )
        assert all(ours.argmax() == theirs.argmax() for ours, theirs in zip(found, expected, strict=True))
        scale = max(theirs.abs().max().item() for theirs in expected)
        assert worst < (1e-3 if format == "native" else 0.03) * max(1.0, scale)
        assert stats.experts.computed_on_cpu is not None and stats.bytes.not_moved is not None
        assert (stats.experts.computed_on_cpu > 0) == (stats.bytes.not_moved > 0)
        if miss == "cpu":
            assert 0 < stats.experts.computed_on_cpu <= stats.experts.misses


def test_the_way_of_misses_and_the_policies_change_live(checkpoint: Path, packs: Path) -> None:
    with open_tiny(checkpoint, packs, device="cuda", residency=0.3, miss="fetch") as engine:
        expected = logits_of(engine)
        for change in (
            LiveChanges(miss="cpu"),
            LiveChanges(host_policy="lru", policy="ewma"),
            LiveChanges(miss="auto", prefetch="next-gate"),
            LiveChanges(residency=0.6),
        ):
            engine.change(change)
            found = logits_of(engine)
            assert all((a - b).abs().max() < 1e-3 * b.abs().max() for a, b in zip(found, expected, strict=True))
        engine.change(LiveChanges(miss="fetch", prefetch="off"))
        assert all(torch.equal(a, b) for a, b in zip(logits_of(engine), expected, strict=True))
        assert engine.stats().host_policy == "lru"


@pytest.mark.parametrize("tiers", ["inclusive", "exclusive"])
@pytest.mark.parametrize("host_policy", ["foresight", "lru"])
def test_little_ram_behind_the_card(tiers: str, host_policy: str, checkpoint: Path, packs: Path) -> None:
    settings = {"device": "cuda", "residency": 0.2, "tiers": tiers, "host_policy": host_policy, "miss": "fetch"}
    with open_tiny(checkpoint, packs, device="cuda", residency=1.0, miss="fetch") as engine:
        expected = logits_of(engine)
    with open_tiny(checkpoint, packs, **settings) as engine:
        loads = engine._runtime.loads
        assert isinstance(loads, TieredLoads)
        loads.resize_host(8)
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(logits_of(engine), expected, strict=True))
        stats = finish(engine.generate("Once upon a time", VARIED))[1].stats
        assert stats.host_tier is not None and stats.host_tier.misses > 0 and stats.bytes.disk_read > 0
        loads.tier.check_integrity()


def test_the_same_sum_every_time_without_the_grouped_kernels(checkpoint: Path, packs: Path) -> None:
    settings = {"device": "cuda", "format": "int4", "kernels": "torch", "residency": 1.0}
    with open_tiny(checkpoint, packs, **settings) as engine:
        expected = logits_of(engine)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(logits_of(engine), expected, strict=True))


def test_vram_used_and_its_budget_can_be_compared(checkpoint: Path, packs: Path) -> None:
    with open_tiny(checkpoint, packs, device="cuda", residency=0.5) as engine:
        finish(engine.generate("Once upon a time", VARIED))
        assert isinstance(engine.plan, TierPlan)
        memory, used = engine.stats().memory, engine.snapshot().vram_bytes
        assert memory.vram_budget_bytes == engine.plan.vram_budget
        assert used is not None and engine.plan.vram.reserved <= used <= engine.plan.vram_budget


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


def test_the_cpu_computes_beside_copies(checkpoint: Path, packs: Path, report: list[str]) -> None:
    """Copies that an event did not have to wait for, while the CPU computed."""
    for miss in ("fetch", "cpu", "auto"):
        with open_tiny(checkpoint, packs, device="cuda", residency=0.25, miss=miss) as engine:
            finish(engine.generate("Once upon a time", VARIED))
            stats = finish(engine.generate("and then", VARIED))[1].stats
        report.append(
            f"--miss {miss}: {stats.decode_tokens_per_s or 0:.1f} tokens/s, hits {stats.experts.hit_rate or 0:.0%}, "
            f"{stats.bytes.host_to_device} bytes up, link stalls {stats.seconds.stall_link or 0:.4f} of "
            f"{stats.seconds.total:.4f} s"
        )
        assert stats.miss == miss and stats.seconds.stall_link is not None
        assert stats.seconds.stall_link <= stats.seconds.total
