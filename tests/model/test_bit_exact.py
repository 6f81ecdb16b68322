"""Logits equal stock transformers with ``eager`` experts bit for bit, whatever share of the experts is resident."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offload.catalogue import load_catalogue
from offload.checkpoint.manifest import EXPERT_FILE_NAME, Manifest
from offload.engine import Engine
from tests.engines import open_tiny
from tests.families import described
from tests.tiny_models import TINY_ARCHITECTURES, build_tiny, reference_logits

IDS = torch.randint(5, 300, (1, 21), generator=torch.Generator().manual_seed(3))
DECODE_IDS = [7, 9, 11, 200]
SMALLEST, HALF, ALL = 1e-9, 0.5, 1.0


def logits(engine: Engine) -> list[torch.Tensor]:
    """All positions of the prompt, then each decode step, as :func:`reference_logits` gives them."""
    seen: list[torch.Tensor] = []
    hook = engine._model.register_forward_hook(lambda module, args, output: seen.append(output.logits.clone()))
    engine._passes.run(IDS[0].tolist(), decode=False, all_positions=True)
    for token in DECODE_IDS:
        engine._passes.run([token], decode=True)
    hook.remove()
    return seen


def assert_equal(ours: list[torch.Tensor], reference: list[torch.Tensor]) -> None:
    assert len(ours) == len(reference)
    for step, (mine, theirs) in enumerate(zip(ours, reference, strict=True)):
        assert torch.equal(mine, theirs), f"step {step}: off by {(mine - theirs).abs().max()}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_logits_equal_stock_eager(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = build_tiny(architecture, tmp_path / "checkpoint", dtype=dtype)
    reference = reference_logits(checkpoint, IDS, DECODE_IDS)
    for residency in (SMALLEST, HALF, ALL) if dtype is torch.bfloat16 else (SMALLEST, ALL):
        with open_tiny(checkpoint, tmp_path / "packs", residency=residency) as engine:
            assert_equal(logits(engine), reference)
            engine._runtime.cache.check_integrity()
            if residency == ALL and dtype is torch.float32:
                told = load_catalogue().family(architecture)
                assert described(architecture, checkpoint, engine) == told, "python -m tests.families writes it anew"
    assert engine._runtime.cache.counters.evictions == 0, "with all experts resident nothing is evicted"


@pytest.mark.parametrize("policy", ["lfu", "ewma:half_life=4"])
def test_the_policy_does_not_change_the_logits(policy: str, tmp_path: Path) -> None:
    checkpoint = build_tiny("qwen2_moe", tmp_path / "checkpoint")
    reference = reference_logits(checkpoint, IDS, DECODE_IDS)
    with open_tiny(checkpoint, tmp_path / "packs", residency=0.2, policy=policy) as engine:
        assert_equal(logits(engine), reference)
        assert engine._runtime.cache.counters.evictions > 0


def test_one_corrupted_expert_is_noticed(tmp_path: Path) -> None:
    """The comparison above can fail: flip the sign of one weight in one record that the prompt uses."""
    checkpoint = build_tiny("mixtral", tmp_path / "checkpoint")
    reference = reference_logits(checkpoint, IDS, DECODE_IDS)
    with open_tiny(checkpoint, tmp_path / "packs") as engine:
        assert_equal(logits(engine), reference)
        used = min(engine._runtime.cache.resident())
    (pack,) = (folder for folder in (tmp_path / "packs").iterdir() if folder.is_dir())
    layer = next(layer for layer in Manifest.read(pack).layers if layer.layer == used.layer)
    record_bytes = Manifest.read(pack).layouts[layer.layout].record_bytes
    with open(pack / EXPERT_FILE_NAME, "r+b") as file:
        file.seek(layer.offset + used.expert * record_bytes + 3)  # the top byte of a little-endian float32
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x80]))
    with open_tiny(checkpoint, tmp_path / "packs") as engine:
        assert not all(torch.equal(mine, theirs) for mine, theirs in zip(logits(engine), reference, strict=True))
