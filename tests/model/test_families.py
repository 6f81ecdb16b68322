"""Families beside those of the whole matrix stream their experts and give the stock model's logits, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offload.checkpoint.source import open_source
from offload.config import EngineSettings
from offload.errors import ModelError
from offload.events import Notice
from offload.model import transformers_api as api
from offload.model.families.adapters import ADAPTERS
from offload.opening import plan_only
from tests.engines import open_tiny
from tests.model.test_bit_exact import DECODE_IDS, IDS, SMALLEST, assert_equal, logits
from tests.tiny_models import FURTHER_ARCHITECTURES, MULTIMODAL, build_tiny, load_reference, reference_logits

ADAPTED = ("llama4_text", "longcat_flash", "dbrx", "jetmoe", "step3p7")


@pytest.mark.parametrize("architecture", FURTHER_ARCHITECTURES)
def test_further_architectures(architecture: str, tmp_path: Path) -> None:
    checkpoint = build_tiny(architecture, tmp_path / "checkpoint", dtype=torch.bfloat16)
    with open_tiny(checkpoint, tmp_path / "packs", residency=SMALLEST) as engine:
        assert_equal(logits(engine), reference_logits(checkpoint, IDS, DECODE_IDS))


@pytest.mark.parametrize("architecture", MULTIMODAL)
def test_text_of_multimodal_checkpoints(architecture: str, tmp_path: Path) -> None:
    checkpoint = build_tiny(architecture, tmp_path / "checkpoint", dtype=torch.bfloat16)
    expected = reference_logits(checkpoint, IDS, DECODE_IDS, whole=True)
    with open_tiny(checkpoint, tmp_path / "packs", residency=SMALLEST) as engine:
        assert_equal(logits(engine), expected)
        held = {name for name, _ in engine._model.named_parameters()}
    assert held and not any(part in name for name in held for part in ("vis", "audio", "mm_", "multi_modal"))


def test_what_is_left_out_is_said_and_not_counted(tmp_path: Path) -> None:
    checkpoint = build_tiny("qwen3_vl_moe", tmp_path / "checkpoint")
    said: list[str] = []
    planned = plan_only(
        EngineSettings(model=str(checkpoint), context_tokens=64),
        lambda event: said.append(event.text) if isinstance(event, Notice) else None,
    )
    assert [line for line in said if "its vision part is left out" in line]
    whole = load_reference(checkpoint, whole=True)
    experts = sum(p.nbytes for name, p in whole.named_parameters() if ".experts." in name)
    vision = sum(p.nbytes for name, p in whole.named_parameters() if ".visual." in name)
    everything = sum(p.nbytes for p in whole.parameters())
    buffers = sum(b.nbytes for name, b in whole.named_buffers() if ".visual." not in name)
    assert planned.plan.sizes.skeleton_bytes == everything - experts - vision + buffers
    source = open_source(checkpoint)
    assert not [key for key in source.skeleton_keys if "visual" in key]
    source.close()


def test_a_part_that_was_left_out_cannot_be_called(tmp_path: Path) -> None:
    source = open_source(build_tiny("qwen3_vl_moe", tmp_path))
    with pytest.raises(ModelError, match="its part 'visual', which is left out"):
        source.model.model.visual(torch.zeros(1))
    source.close()


def test_all_adapters_are_used() -> None:
    assert len(ADAPTED) == len(ADAPTERS)


@pytest.mark.parametrize("architecture", ADAPTED)
def test_adapted_families_on_a_device_with_memory_of_its_own(architecture: str, tmp_path: Path) -> None:
    checkpoint = build_tiny(architecture, tmp_path / "checkpoint", dtype=torch.bfloat16)
    expected = reference_logits(checkpoint, IDS, DECODE_IDS, whole=architecture == "step3p7")
    settings = {"device": "simulated", "residency": 0.5, "prefetch": "next-gate"}
    with open_tiny(checkpoint, tmp_path / "packs", **settings) as engine:
        assert_equal([step.cpu() for step in logits(engine)], expected)
        assert all(api.find_router(engine._model, module) for module in api.find_experts(engine._model)), "next-gate"


@pytest.mark.parametrize("architecture", ADAPTED)
def test_a_damaged_expert_shows_in_adapted_families(architecture: str, tmp_path: Path) -> None:
    """The comparisons can fail: half of the weights of the experts are turned round after packing."""
    checkpoint = build_tiny(architecture, tmp_path / "checkpoint")
    with open_tiny(checkpoint, tmp_path / "packs") as engine:
        before = logits(engine)
        engine.reset()
        for slot in range(len(engine._runtime._arena.available)):
            record = engine._runtime._arena.tensor(slot)
            record.view(torch.float32).neg_()
        after = logits(engine)
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_longcat_as_it_is_published(tmp_path: Path) -> None:
    """Stock saving writes weights of zero experts, which stock loading wants and no published checkpoint has."""
    checkpoint = build_tiny("longcat_flash", tmp_path / "checkpoint")
    expected = reference_logits(checkpoint, IDS, DECODE_IDS)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        tensors = load_file(checkpoint / file)
        kept = {name: tensor for name, tensor in tensors.items() if _expert_number(name) < 8}
        save_file(kept, checkpoint / file)
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if _expert_number(name) < 8}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_tiny(checkpoint, tmp_path / "packs", residency=SMALLEST) as engine:
        assert_equal(logits(engine), expected)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_experts_that_a_token_decides_are_foretold(device: str, tmp_path: Path) -> None:
    """The first three layers of DeepSeek V4: a token's experts there are all known when it begins, and no others."""
    checkpoint = build_tiny("deepseek_v4", tmp_path / "checkpoint", dtype=torch.bfloat16)
    expected = reference_logits(checkpoint, IDS, DECODE_IDS)
    settings = {"device": device, "residency": 0.8, "prefetch": "next-gate"}
    with open_tiny(checkpoint, tmp_path / "packs", **settings) as engine:
        layers = [module.mlp.is_hash for module in engine._model.model.layers]
        assert layers == [True, True, True, False]
        runtime = engine._runtime
        told: list[tuple[int, list[int]]] = []
        taken: list[tuple[int, list[int]]] = []
        prefetch, record = runtime._prefetch, runtime.predictor.record_event
        # what a token decides comes as a list, what is guessed one by one
        runtime._prefetch = lambda guesses: (
            told.extend(guesses) if isinstance(guesses, list) else None,
            prefetch(guesses),
        )[1]
        runtime.predictor.record_event = lambda layer, experts, *, decode: (
            taken.append((layer, experts)) if decode else None,
            record(layer, experts, decode=decode),
        )[1]
        assert_equal([step.cpu() for step in logits(engine)], expected)
    hashed = [(layer, sorted(experts)) for layer, experts in told if layer < 3]
    assert len(hashed) == 3 * len(DECODE_IDS)
    assert hashed == [(layer, sorted(experts)) for layer, experts in taken if layer < 3]
    assert runtime.transfers.prefetched > 0


def _expert_number(name: str) -> int:
    _, found, rest = name.partition(".experts.")
    return int(rest.split(".")[0]) if found else 0


def test_llama4_with_several_experts_for_a_token_is_refused(tmp_path: Path) -> None:
    checkpoint = build_tiny("llama4_text", tmp_path, sizes={"num_experts_per_tok": 2})
    with pytest.raises(ModelError, match="llama4 models with 2 experts for a token are not supported"):
        open_source(checkpoint)
