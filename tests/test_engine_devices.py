"""The engine on the simulated GPU: the same tokens as on the CPU at any tier sizes, and what only tiers can do."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.keys import ExpertKey
from offload.checkpoint.expert_file import ExpertFile
from offload.config import SamplingSettings
from offload.devices.simulated import VramExhausted
from offload.engine import Engine
from offload.errors import BudgetError, ExpertFileError, UsageError
from offload.events import Done, ExpertState, LiveChanges, Notice, PrefillProgress, RunStats
from offload.memory.tier_plan import TierPlan
from offload.memory.tiers import TieredLoads
from tests.engines import finish, open_tiny
from tests.tiny_models import build_tiny

PROMPT = "Once upon a time"
VARIED = SamplingSettings(temperature=1.2, seed=5, max_new_tokens=12)
MIB = 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("qwen3_moe", tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs")


@pytest.fixture(scope="module")
def expected(checkpoint: Path, packs: Path) -> list[torch.Tensor]:
    with open_tiny(checkpoint, packs) as engine:
        return logits_of(engine)


@pytest.fixture
def engine(checkpoint: Path, packs: Path) -> Iterator[Engine]:
    with open_tiny(checkpoint, packs, device="simulated", residency=0.5) as opened:
        yield opened


def logits_of(engine: Engine) -> list[torch.Tensor]:
    """Of a prompt and three decoding steps."""
    engine.reset()
    engine._runtime.cancelled.clear()
    return [engine._passes.run([3, 9, 27, 81, 11, 12], decode=False)] + [
        engine._passes.run([token], decode=True) for token in (5, 50, 7)
    ]


def check(engine: Engine) -> None:
    """Nothing leaked: slots, pins, staging buffers, tickets."""
    runtime = engine._runtime
    runtime.settle()
    runtime.cache.check_integrity()
    loads = runtime.loads
    assert isinstance(loads, TieredLoads)
    loads.tier.check_integrity()
    assert not loads.tier._pins and not loads.tier._loading
    plan = engine.plan
    assert isinstance(plan, TierPlan)
    assert len(loads.staging) == plan.staging


def staging_only(checkpoint: Path, packs: Path) -> int:
    """The smallest --ram, which leaves nothing but staging buffers, and a little for what the process grows by."""
    with pytest.raises(BudgetError) as caught:
        open_tiny(checkpoint, packs, device="simulated", ram=MIB)
    return (int(str(caught.value).split("works is --ram ")[1].split("MiB")[0])) * MIB


@pytest.mark.parametrize("tiers", ["inclusive", "exclusive"])
@pytest.mark.parametrize("prefetch", ["off", "next-gate"])
@pytest.mark.parametrize("residency", [0.01, 0.4, 1.0])
def test_the_logits_are_those_of_the_cpu(
    tiers: str, prefetch: str, residency: float, checkpoint: Path, packs: Path, expected: list[torch.Tensor]
) -> None:
    settings = {"tiers": tiers, "prefetch": prefetch, "residency": residency, "miss": "fetch"}
    with open_tiny(checkpoint, packs, device="simulated:rtx4090", **settings) as engine:
        for ours, theirs in zip(logits_of(engine), expected, strict=True):
            assert torch.equal(ours, theirs)
        check(engine)


@pytest.mark.parametrize("architecture", ["gpt_oss", "deepseek_v3", "qwen3_next"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    folder = build_tiny(architecture, tmp_path / "checkpoint", dtype=torch.bfloat16)
    with open_tiny(folder, tmp_path) as engine:
        expected = logits_of(engine)
    with open_tiny(folder, tmp_path, device="simulated", residency=0.3, tiers="exclusive") as engine:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits_of(engine), expected, strict=True))
        check(engine)


def test_quantised_weights(checkpoint: Path, tmp_path: Path) -> None:
    formats = {"format": "int4", "dense_format": "int8"}
    with open_tiny(checkpoint, tmp_path, kernels="torch", **formats) as engine:
        expected = logits_of(engine)
    with open_tiny(checkpoint, tmp_path, device="simulated", residency=0.3, miss="fetch", **formats) as engine:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits_of(engine), expected, strict=True))


def test_everything_in_ram_needs_no_disk_after_the_load(
    checkpoint: Path, packs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_reads(*args: object) -> int:
        raise ExpertFileError("read")

    with open_tiny(checkpoint, packs, device="simulated", residency=0.1, miss="fetch") as engine:
        monkeypatch.setattr(ExpertFile, "read_into", no_reads)
        _, done = finish(engine.generate(PROMPT, VARIED))
        assert done.error is None
        stats = done.stats
        assert stats.bytes.disk_read == 0 < stats.experts.misses
        assert stats.bytes.host_to_device == stats.experts.misses * engine.plan.sizes.slot_bytes
        assert stats.host_tier is not None and stats.host_tier.hit_rate == 1


def test_nothing_in_ram_but_staging_buffers(checkpoint: Path, packs: Path, expected: list[torch.Tensor]) -> None:
    ram = staging_only(checkpoint, packs) + MIB // 2
    with open_tiny(checkpoint, packs, device="simulated", residency=0.2, ram=ram) as engine:
        assert isinstance(engine.plan, TierPlan)
        engine.change(LiveChanges(ram=None))
        loads: Any = engine._runtime.loads
        loads.resize_host(0)
        assert loads.tier.slots == 0
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits_of(engine), expected, strict=True))
        misses = engine._runtime.cache.counters.prefill.misses + engine._runtime.cache.counters.decode.misses
        assert loads.host.misses >= misses > 0 == loads.host.hits


def test_victims_fall_back_into_host_memory_without_a_read(checkpoint: Path, packs: Path) -> None:
    with open_tiny(checkpoint, packs, device="simulated", residency=0.2, tiers="exclusive") as engine:
        finish(engine.generate(PROMPT, VARIED))
        finish(engine.generate("something else", VARIED))
        stats = engine.stats()
        check(engine)
        assert isinstance(engine.plan, TierPlan) and engine.plan.in_memory == 1
        runtime: Any = engine._runtime
        both = runtime.cache.resident() & runtime.loads.tier.resident()
        assert not both, "a record is in one tier"
    assert stats.host_tier is not None
    assert stats.bytes.disk_read <= 32 * 24576, "no record is read twice: both tiers together hold all"
    assert stats.host_tier.demoted > 0
    assert stats.bytes.device_to_host == stats.host_tier.demoted * 24576


def test_a_run_takes_the_same_virtual_time_every_time(checkpoint: Path, packs: Path) -> None:
    def run(hardware: str) -> RunStats:
        settings = {"residency": 0.3, "prefetch": "next-gate", "tiers": "exclusive"}
        with open_tiny(checkpoint, packs, device=f"simulated:{hardware}", **settings) as engine:
            return finish(engine.generate(PROMPT, VARIED))[1].stats

    first, again, faster = run("rtx4060"), run("rtx4060"), run("rtx5090")
    assert first.virtual and first.device == "simulated:rtx4060"
    assert (first.seconds, first.ttft_s, first.experts) == (again.seconds, again.ttft_s, again.experts)
    assert first.seconds.stall_link is not None and first.seconds.stall_link > 0
    assert faster.seconds.total < first.seconds.total
    assert faster.seconds.stall_disk < first.seconds.stall_disk
    json.dumps(first.to_json(), allow_nan=False)


def test_a_snapshot_tells_the_tiers_apart(checkpoint: Path, packs: Path) -> None:
    with open_tiny(checkpoint, packs, device="simulated", residency=0.3, tiers="exclusive") as engine:
        finish(engine.generate(PROMPT, VARIED))
        snapshot, stats = engine.snapshot(), engine.stats()
    device, host = snapshot.tiers
    assert (device.name, host.name) == ("VRAM", "RAM") and stats.host_tier is not None
    assert (device.hits, host.hits) == (stats.experts.hits, stats.host_tier.hits) and host.hits > 0
    counted = Counter(state for row in snapshot.states for state in row)
    assert counted[ExpertState.READY] == device.used == engine.plan.slots
    assert counted[ExpertState.HOSTED] == host.used > 0  # a record is in one tier
    assert all(token.link_bytes is not None and token.stall_link is not None for token in snapshot.recent)


def test_vram_is_bounded(engine: Engine) -> None:
    finish(engine.generate(PROMPT, VARIED))
    memory = engine.stats().memory
    assert memory.vram_budget_bytes is not None and memory.vram_peak_bytes is not None
    assert engine.plan.slots * engine.plan.sizes.slot_bytes < memory.vram_peak_bytes <= memory.vram_budget_bytes
    assert isinstance(engine.plan, TierPlan)
    assert memory.vram_budget_bytes == engine.plan.vram_budget, "the context is in both"
    assert engine.snapshot().vram_bytes >= engine.plan.vram.reserved + engine.plan.slots * engine.plan.sizes.slot_bytes


def test_memory_that_is_refused_at_run_time_costs_slots_and_is_said(
    engine: Engine, expected: list[torch.Tensor]
) -> None:
    whole = finish(engine.generate(PROMPT, VARIED))[1].text
    engine.reset()
    before, vram = engine.plan.slots, engine._device.vram  # type: ignore[attr-defined]
    vram.budget = vram.used + 1000  # somebody else took the rest
    events, done = finish(engine.generate(PROMPT, VARIED))
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert notices and "expert slots were given up" in notices[0]
    assert done.error is None and done.text == whole
    assert engine.plan.slots < before
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits_of(engine), expected, strict=True))
    check(engine)


def test_memory_that_is_refused_half_way_through_a_recurrent_model(tmp_path: Path) -> None:
    folder = build_tiny("qwen3_next", tmp_path / "checkpoint")
    with open_tiny(folder, tmp_path, device="simulated", residency=0.5) as engine:
        whole = finish(engine.generate(PROMPT, VARIED))[1].text
        engine.reset()
        calls = []

        def refuse(*args: object) -> None:
            calls.append(0)
            if len(calls) == 9:
                raise VramExhausted("no room")

        hook = engine._model.model.layers[2].register_forward_hook(refuse)
        events, done = finish(engine.generate(PROMPT, VARIED))
        hook.remove()
        assert sum(isinstance(event, Notice) for event in events) == 1
        assert done.text == whole


def test_no_memory_and_no_slots_to_give_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise VramExhausted("no room")

    hook = engine._model.model.layers[2].register_forward_hook(refuse)
    _, done = finish(engine.generate(PROMPT, VARIED))
    assert done.error is not None and "no expert slots to give up" in done.error
    hook.remove()
    assert finish(engine.generate(PROMPT, VARIED))[1].error is None


def test_slots_that_are_refused_at_the_start(checkpoint: Path, packs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offload.config import EngineSettings
    from offload.devices.simulated.device import SimulatedDevice
    from offload.engine import open_engine

    real = SimulatedDevice.allocate_slots

    def with_less(self: SimulatedDevice, *args: Any) -> Any:
        self.vram.budget = self.vram.used + 5 * 24576
        return real(self, *args)

    monkeypatch.setattr(SimulatedDevice, "allocate_slots", with_less)
    said: list[Any] = []
    settings = EngineSettings(
        model=str(checkpoint), device="simulated", experts_dir=packs, context_tokens=64, residency=0.5
    )
    with open_engine(settings, said.append) as engine:
        assert engine.plan.slots == engine._runtime.cache.slots == 5
    assert any(isinstance(event, Notice) and "refuses memory for 11 of 16" in event.text for event in said)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_budgets_change_between_tokens(
    device: str, checkpoint: Path, packs: Path, expected: list[torch.Tensor]
) -> None:
    with open_tiny(checkpoint, packs, device=device, residency=0.5) as engine:
        whole = finish(engine.generate(PROMPT, VARIED))[1].text
        slots = []
        for number, event in enumerate(engine.generate(PROMPT, VARIED)):
            if isinstance(event, Done):
                assert event.text == whole
            elif not isinstance(event, PrefillProgress):
                resident = engine._runtime.cache.resident()
                engine.change(LiveChanges(residency=(0.1, 1.0, 0.3, 0.5)[number % 4]))
                kept = engine._runtime.cache.resident()
                slots.append(engine.plan.slots)
                assert kept <= resident
                assert len(kept) == min(len(resident), engine.plan.slots), "what fits stays"
                assert engine._runtime.cache.slots == engine.plan.slots == len(engine._storage.arena.available)
        assert set(slots) == {3, 32, 10, 16}
        assert engine.stats().memory.expert_slots == engine.plan.slots
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits_of(engine), expected, strict=True))


def test_budgets_in_bytes(engine: Engine) -> None:
    plan = engine.plan
    assert isinstance(plan, TierPlan)
    size = plan.sizes.slot_bytes
    fixed = plan.vram_budget - plan.slots * size
    engine.change(LiveChanges(vram=fixed + 4 * size, ram=plan.budget - 20 * size))
    new = engine.plan
    assert isinstance(new, TierPlan)
    assert (new.slots, new.host_slots) == (4, plan.host_slots - 20)
    assert engine.ram_budget_bytes == plan.budget - 20 * size
    assert engine._device.vram.budget == fixed + 4 * size - plan.vram.reserved  # type: ignore[attr-defined]
    finish(engine.generate(PROMPT, VARIED))
    check(engine)
    with pytest.raises(UsageError, match="smallest that works is --vram"):
        engine.change(LiveChanges(vram=MIB))
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        engine.change(LiveChanges(residency=2.0))
    assert engine.plan == new, "nothing was changed"


def test_a_budget_for_memory_that_a_device_does_not_have(checkpoint: Path, packs: Path) -> None:
    with pytest.raises(UsageError, match="--vram: cpu has no memory of its own"):
        open_tiny(checkpoint, packs, vram=MIB)
    with pytest.raises(UsageError, match="'gtx1' is neither a file nor one of laptop-pcie3, rtx3060"):
        open_tiny(checkpoint, packs, device="simulated:gtx1")


def test_cancel_and_read_errors(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = finish(engine.generate(PROMPT, VARIED))[1].text
    loads: Any = engine._runtime.loads
    loads.resize_host(4)

    def broken(*args: object) -> int:
        raise ExpertFileError("experts.bin: reading the record of layer 1, expert 2 failed")

    monkeypatch.setattr(ExpertFile, "read_into", broken)
    _, done = finish(engine.generate("other words", VARIED))
    assert done.error is not None and "layer 1, expert 2" in done.error
    monkeypatch.undo()
    check(engine)
    stream = engine.generate(PROMPT, VARIED)
    next(stream)
    engine.cancel()
    assert finish(stream)[1].reason == "cancelled"
    check(engine)
    assert finish(engine.generate(PROMPT, VARIED))[1].text == whole


def test_the_policy_of_ram_is_one_of_its_own_and_changes_live(checkpoint: Path, packs: Path) -> None:
    settings = {"device": "simulated", "residency": 0.2, "host_policy": "ewma"}
    with open_tiny(checkpoint, packs, **settings) as engine:
        loads = engine._runtime.loads
        assert isinstance(loads, TieredLoads) and loads.tier.policy.name == "ewma"
        loads.resize_host(8)
        first = finish(engine.generate(PROMPT, VARIED))[1]
        assert first.stats.host_policy == "ewma" == engine.snapshot().current.host_policy
        engine.change(LiveChanges(host_policy="lru"))
        assert loads.tier.policy.name == "lru" and engine.stats().host_policy == "lru"
        loads.tier.check_integrity()
        with pytest.raises(UsageError, match="--host-policy: unknown policy 'mru'"):
            engine.change(LiveChanges(host_policy="mru", prefetch="next-gate"))
        assert loads.tier.policy.name == "lru" and engine.snapshot().current.prefetch == "off"
        engine.reset()
        assert finish(engine.generate(PROMPT, VARIED))[1].text == first.text
        loads.tier.check_integrity()
    with open_tiny(checkpoint, packs, device="cpu") as engine:
        assert engine.stats().host_policy is None
        with pytest.raises(UsageError, match="no memory behind the slots"):
            engine.change(LiveChanges(host_policy="lru"))


@pytest.mark.parametrize("tiers", ["inclusive", "exclusive"])
def test_what_ram_is_told(tiers: str, checkpoint: Path, packs: Path) -> None:
    """A copy of what the device holds is of no use in RAM, however often it is used; a victim of it may be."""
    told: list[int] = []
    with open_tiny(checkpoint, packs, device="simulated", residency=0.5, tiers=tiers) as engine:
        loads = engine._runtime.loads
        assert isinstance(loads, TieredLoads)
        finish(engine.generate(PROMPT, VARIED))
        loads.resize_host(8)
        real = loads.tier.record_event

        def record_event(keys: Sequence[ExpertKey]) -> None:
            told.append(len(keys))
            real(keys)

        loads.tier.record_event = record_event  # type: ignore[method-assign]
        engine.reset()
        stats = finish(engine.generate(PROMPT, VARIED))[1].stats.experts
    lacking = stats.pending + stats.misses
    assert lacking < stats.accesses
    assert sum(told) == (lacking if tiers == "inclusive" else stats.accesses)
