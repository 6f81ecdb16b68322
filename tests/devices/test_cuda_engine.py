"""The whole engine on the CUDA device, whose card is the CPU here: experts go through the grouped kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offload.devices.cuda
from offload.compute.grouped import GroupedKernels
from offload.compute.grouped_experts import GroupedExperts
from offload.config import EngineSettings
from offload.engine import Engine, open_engine
from offload.events import Event, GraphUse, Notice
from offload.model.experts import ExpertRuntime
from tests.engines import open_tiny
from tests.fake_cuda import CPU, FakeCuda
from tests.tiny_models import build_tiny

GIB = 2**30


class CpuAsCard(offload.devices.cuda.CudaDevice):
    def __init__(self, number: int) -> None:
        self.torch_device = self.load_device = CPU
        self.name = f"cuda:{number}"
        self._budget = 8 * GIB


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, grouped: GroupedKernels) -> FakeCuda:
    if not grouped.interpreted:
        pytest.skip("there is a real card")
    fake = FakeCuda()
    fake.install(monkeypatch)
    fake.done = True
    for name, answer in (
        ("device_count", 1),
        ("get_device_name", "NVIDIA Example"),
        ("mem_get_info", (7 * GIB, 8 * GIB)),
        ("memory_reserved", 0),
        ("max_memory_reserved", 0),
        ("set_per_process_memory_fraction", None),
        ("synchronize", None),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, answer=answer: answer)
    monkeypatch.setattr("offload.compute.grouped.loading.largest_error", lambda *arguments: 0.0)  # tried elsewhere
    monkeypatch.setattr(offload.devices.cuda, "cuda_is_there", lambda: True)
    monkeypatch.setattr(offload.devices.cuda, "CudaDevice", CpuAsCard)
    return fake


def logits_of(engine: Engine) -> list[torch.Tensor]:
    return [engine._passes.run([3, 9, 27], decode=False), engine._passes.run([5], decode=True)]


def opened(checkpoint: Path, packs: Path, **settings: Any) -> tuple[list[torch.Tensor], ExpertRuntime]:
    with open_tiny(checkpoint, packs, **settings) as engine:
        return logits_of(engine), engine._runtime


@pytest.mark.parametrize(
    ("architecture", "format"),
    [
        ("qwen3_moe", "int4"),
        pytest.param("qwen3_moe", "native", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "int8", marks=pytest.mark.slow),
        pytest.param("nemotron_h", "native", marks=pytest.mark.slow),
    ],
)
def test_the_logits_are_those_of_torch(architecture: str, format: str, tmp_path: Path, card: FakeCuda) -> None:
    checkpoint = build_tiny(architecture, tmp_path / "checkpoint")
    formats = {"format": format, "kernels": "torch"}
    expected, runtime = opened(checkpoint, tmp_path, device="cuda", **formats)
    assert not isinstance(runtime._compute, GroupedExperts)
    found, runtime = opened(checkpoint, tmp_path, device="cuda", format=format, residency=1.0)
    assert isinstance(runtime._compute, GroupedExperts)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    few, _ = opened(checkpoint, tmp_path, device="cuda", format=format, residency=0.1)
    for ours, theirs in zip(few, found, strict=True):
        # gpt_oss: on the CPU, torch's exp depends on the number of values, and the gate is the model's own code
        assert torch.equal(ours, theirs) if architecture == "qwen3_moe" else torch.allclose(ours, theirs, atol=1e-5)


def test_resident_experts_take_two_calls_an_event(tmp_path: Path, card: FakeCuda) -> None:
    checkpoint = build_tiny("qwen3_moe", tmp_path / "checkpoint")
    with open_tiny(checkpoint, tmp_path, device="cuda", format="int8", residency=1.0) as engine:
        engine._passes.run([7], decode=True)
        engine.reset()
        counted = engine._runtime.transfers
        events, calls = counted.events, counted.compute_calls
        engine._passes.run([7], decode=True)
        assert counted.compute_calls - calls == 2 * (counted.events - events) > 0


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_graphs_are_captured_once_and_replayed(family: str, tmp_path: Path, card: FakeCuda) -> None:
    checkpoint = build_tiny(family, tmp_path / "checkpoint")
    settings: dict[str, Any] = {"device": "cuda", "kernels": "torch", "residency": 0.5, "miss": "fetch"}

    def decoded(graphs: str) -> tuple[list[torch.Tensor], GraphUse | None]:
        with open_tiny(checkpoint, tmp_path, graphs=graphs, **settings) as engine:
            found = [engine._passes.run([3, 9, 27], decode=False)]
            found += [engine._passes.run([token], decode=True) for token in (5, 50, 7, 8)]
            return found, engine.stats().graphs

    expected, _ = decoded("off")
    _, use = decoded("auto")
    assert use is not None and not use.used and use.reason is not None
    assert use.reason.startswith("auto: tests/gpu has not confirmed them on NVIDIA Example, torch 2.")
    assert not any(entry[0] == "graph" for entry in card.log)
    found, use = decoded("on")
    assert use is not None and (use.used, use.graphs, use.tokens) == (True, 5, 2)
    done = [entry[1] for entry in card.log if entry[0] == "graph"]
    assert done == ["begins", "ends", "replays"] * 5 + ["replays"] * 10
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_a_capture_that_the_card_refuses_changes_nothing(tmp_path: Path, card: FakeCuda) -> None:
    checkpoint = build_tiny("qwen3_moe", tmp_path / "checkpoint")
    card.refuse_captures = True
    expected, _ = opened(checkpoint, tmp_path, device="cuda", kernels="torch", graphs="off")
    with open_tiny(checkpoint, tmp_path, device="cuda", kernels="torch", graphs="on") as engine:
        found = logits_of(engine)
        for token in (50, 7):
            assert torch.isfinite(engine._passes.run([token], decode=True)).all()
        use = engine.stats().graphs
    assert torch.equal(found[0], expected[0]) and (found[1] - expected[1]).abs().max() < 1e-5
    assert use is not None and use.reason is not None and use.reason.startswith("RuntimeError: CUDA error")
    assert sum(entry == ("graph", "begins", "pool 1", "thread_local") for entry in card.log) == 1


def test_kernels_that_fail_are_told_and_done_without(
    tmp_path: Path, card: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("offload.compute.grouped.loading.largest_error", fails)
    checkpoint = build_tiny("qwen3_moe", tmp_path / "checkpoint")
    events: list[Event] = []
    settings = EngineSettings(
        model=str(checkpoint), context_tokens=128, experts_dir=tmp_path, device="cuda", format="int4"
    )
    with open_engine(settings, events.append) as engine:
        assert not isinstance(engine._runtime._compute, GroupedExperts)
        assert torch.isfinite(logits_of(engine)[1]).all()
    assert [event.text for event in events if isinstance(event, Notice) and "no kernel image" in event.text] == [
        "experts are multiplied by torch, one after the other, since the card's kernels fail: "
        "RuntimeError: no kernel image is available"
    ]
