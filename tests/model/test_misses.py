"""``--miss``: the CPU's part of an event gives the same numbers, is counted, costs time, and can be changed live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from offload.config import MISSES, EngineSettings
from offload.engine import Engine, open_engine
from offload.errors import UsageError
from offload.events import LiveChanges, Notice
from offload.memory.tier_plan import TierPlan
from offload.memory.tiers import TieredLoads
from tests.engines import GREEDY, finish, open_tiny
from tests.model.measure_misses import build, measure, scaled
from tests.tiny_models import build_tiny

PROMPT = "Once upon a time"


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


def logits_of(engine: Engine) -> list[torch.Tensor]:
    """Of a prompt and three decoding steps."""
    engine.reset()
    return [engine._passes.run([3, 9, 27, 81, 11, 12], decode=False, ends=True)] + [
        engine._passes.run([token], decode=True) for token in (5, 50, 7)
    ]


def check(engine: Engine) -> None:
    """Nothing leaked: slots, pins, staging buffers."""
    engine._runtime.settle()
    engine._runtime.cache.check_integrity()
    loads = engine._runtime.loads
    assert isinstance(loads, TieredLoads) and isinstance(engine.plan, TierPlan)
    loads.tier.check_integrity()
    assert not loads.tier._pins and not loads.tier._loading
    assert len(loads.staging) == engine.plan.staging


def on_cpu(engine: Engine) -> int:
    return engine._runtime.transfers.computed_on_cpu


@pytest.mark.parametrize("miss", ["cpu", "auto"])
@pytest.mark.parametrize(
    "settings",
    [
        {"residency": 0.1},
        {"residency": 0.5, "policy": "lru", "scope": "layer"},
        {"residency": 0.5, "tiers": "exclusive", "prefetch": "next-gate"},
    ],
    ids=str,
)
def test_native_weights_give_the_same_bits_on_the_pretend_gpu(
    miss: str, settings: dict[str, Any], checkpoint: Path, packs: Path, expected: list[torch.Tensor]
) -> None:
    """A real GPU rounds differently from the CPU; this one has the CPU's operations."""
    with open_tiny(checkpoint, packs, device="simulated:rtx4090", miss=miss, **settings) as engine:
        for _ in range(2):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits_of(engine), expected, strict=True))
        assert on_cpu(engine) > 0
        check(engine)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "architecture", ["gpt_oss", *(pytest.param(x, marks=SLOW) for x in ("deepseek_v3", "nemotron_h"))]
)
def test_other_experts(architecture: str, tmp_path: Path) -> None:
    """Biases, no gate, gates and norms of their own."""
    folder = build_tiny(architecture, tmp_path / "checkpoint", dtype=torch.bfloat16)
    with open_tiny(folder, tmp_path) as engine:
        expected = logits_of(engine)
    with open_tiny(folder, tmp_path, device="simulated", residency=0.3, miss="cpu") as engine:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits_of(engine), expected, strict=True))
        assert on_cpu(engine) > 0


@pytest.mark.parametrize("weights", [pytest.param("int8", marks=SLOW), "int4"])
def test_quantised_weights_differ_by_rounding_alone(weights: str, checkpoint: Path, packs: Path) -> None:
    found, texts = {}, set()
    for miss in MISSES:
        with open_tiny(checkpoint, packs, device="simulated", residency=0.3, miss=miss, format=weights) as engine:
            found[miss] = logits_of(engine)
            assert (on_cpu(engine) > 0) == (miss != "fetch")
            engine.reset()
            texts.add(finish(engine.generate(PROMPT, GREEDY))[1].text)
    scale = max(part.abs().max().item() for part in found["fetch"])
    for miss in ("cpu", "auto"):
        worst = max((a - b).abs().max().item() for a, b in zip(found[miss], found["fetch"], strict=True))
        assert worst < 1e-5 * scale, miss
    assert len(texts) == 1


def test_statistics(checkpoint: Path, packs: Path) -> None:
    with open_tiny(checkpoint, packs, device="simulated", residency=0.5, miss="cpu") as engine:
        _, done = finish(engine.generate(PROMPT, GREEDY))
        stats, size = done.stats, engine.plan.sizes.slot_bytes
        assert stats.miss == "cpu"
        assert stats.experts.computed_on_cpu == stats.experts.misses > 0, "all lie in RAM"
        assert stats.bytes.not_moved == stats.experts.misses * size
        assert stats.bytes.host_to_device is not None and stats.bytes.host_to_device % size == 0
        assert stats.experts.hits > 0, "what is used again is copied in idle time"
        assert stats.bytes.host_to_device < stats.bytes.not_moved
        assert stats.host_tier is not None and stats.host_tier.hits >= stats.experts.misses
        assert stats.experts.compute_calls >= stats.experts.events


def test_what_lies_on_disk_is_fetched(checkpoint: Path, packs: Path, expected: list[torch.Tensor]) -> None:
    with open_tiny(checkpoint, packs, device="simulated", residency=0.2, miss="cpu") as engine:
        loads = engine._runtime.loads
        assert isinstance(loads, TieredLoads)
        engine._runtime.settle()
        loads.resize_host(0)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits_of(engine), expected, strict=True))
        assert on_cpu(engine) == 0
        loads.resize_host(6)
        for _ in range(3):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits_of(engine), expected, strict=True))
        assert on_cpu(engine) > 0
        check(engine)


def test_an_error_in_the_cpus_part_leaves_nothing_behind(
    checkpoint: Path, packs: Path, expected: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload.errors import Cancelled
    from offload.model.host_experts import HostEvent

    with open_tiny(checkpoint, packs, device="simulated", residency=0.5, miss="cpu") as engine:

        def broken(*args: object) -> None:
            raise Cancelled

        with monkeypatch.context() as patch:
            patch.setattr(HostEvent, "compute", broken)
            with pytest.raises(Cancelled):
                logits_of(engine)
        check(engine)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits_of(engine), expected, strict=True))


def test_changing_it_live(checkpoint: Path, packs: Path, expected: list[torch.Tensor]) -> None:
    with open_tiny(checkpoint, packs, device="simulated", residency=0.1, miss="fetch") as engine:
        assert engine.choices["miss"] == MISSES and engine.snapshot().current.miss == "fetch"
        counts = []
        for miss in ("fetch", "cpu", "auto", "fetch"):
            engine.change(LiveChanges(miss=miss))
            assert engine.snapshot().current.miss == engine.stats().miss == miss
            before = on_cpu(engine)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits_of(engine), expected, strict=True))
            counts.append(on_cpu(engine) - before)
            check(engine)
        assert counts[0] == counts[3] == 0 < counts[1]
        with pytest.raises(UsageError, match="--miss: 'gpu' is not one of auto, fetch, cpu"):
            engine.change(LiveChanges(miss="gpu", policy="lru"))
        assert engine.stats().policy != "lru", "nothing was changed"


def test_on_the_cpu_there_is_nothing_to_choose(checkpoint: Path, packs: Path) -> None:
    said: list[Any] = []
    settings = EngineSettings(model=str(checkpoint), device="cpu", experts_dir=packs, context_tokens=64, miss="cpu")
    with open_engine(settings, said.append) as engine:
        assert [event.text for event in said if isinstance(event, Notice) and "--miss cpu" in event.text] == [
            "--miss cpu: there is nothing to choose where slots are RAM; every miss is read and computed there"
        ]
        assert "miss" not in engine.choices and engine.snapshot().current.miss is None
        assert engine.stats().miss is None and engine.stats().experts.computed_on_cpu is None
        with pytest.raises(UsageError, match="nothing to choose"):
            engine.change(LiveChanges(miss="fetch"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rtx4060", "rtx4090"])
def test_auto_is_as_fast_as_the_better_one(name: str, tmp_path: Path) -> None:
    """On virtual time, with records that take as long as those of Qwen3-30B-A3B."""
    folder = build(tmp_path / "checkpoint")
    with open_tiny(folder, tmp_path, residency=0.01) as engine:
        hardware = scaled(name, engine.plan.sizes.slot_bytes, tmp_path)
    found = {miss: measure(folder, tmp_path, hardware, tokens=24, residency=0.25, miss=miss) for miss in MISSES}
    best = max(found["fetch"].tokens_per_s, found["cpu"].tokens_per_s)
    assert found["auto"].tokens_per_s >= 0.97 * best
    assert found["auto"].tokens_per_s > found["fetch"].tokens_per_s, "here the CPU beats the link"
    assert found["auto"].bound >= 0.8
    prefill = {miss: one.prefill_tokens_per_s or 0.0 for miss, one in found.items()}
    assert prefill["auto"] >= 0.97 * max(prefill["fetch"], prefill["cpu"])
