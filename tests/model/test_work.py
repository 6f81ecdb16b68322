"""What a token costs, against the sum over a tiny model's matrices."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines import open_tiny
from tests.tiny_models import build_tiny, load_reference

FORMATS = [("native", "native"), ("int8", "int8"), ("int4", "native"), ("mixed", "int8")]


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_operations_of_a_token(tmp_path: Path, formats: tuple[str, str]) -> None:
    """Of attention, routers, shared experts and the chosen experts; not of embeddings and head."""
    checkpoint = build_tiny("qwen2_moe", tmp_path / "checkpoint")
    model = load_reference(checkpoint)
    config = model.config
    matrices = {name: weight.numel() for name, weight in model.named_parameters() if weight.ndim > 1}
    ends = sum(count for name, count in matrices.items() if "embed_tokens" in name or "lm_head" in name)
    experts = sum(count for name, count in matrices.items() if ".experts." in name)
    dense = sum(matrices.values()) - ends - experts
    chosen = experts * config.num_experts_per_tok // config.num_experts
    with open_tiny(checkpoint, tmp_path / "packs", format=formats[0], dense_format=formats[1]) as engine:
        work = engine.work()
        sizes = engine.plan.sizes
    dense, chosen = 2 * dense, 2 * chosen
    router = 2 * sum(count for name, count in matrices.items() if "gate.weight" in name)
    expected = {
        ("native", "native"): {0: dense + chosen},
        ("int8", "int8"): {8: dense + chosen - router, 0: router},
        ("int4", "native"): {0: dense, 4: chosen},
        ("mixed", "int8"): {8: dense - router + chosen // 3, 0: router, 4: chosen // 3 * 2},
    }
    found = {bits: flops for bits, flops in work.token_flops.items() if flops}
    assert found == expected[formats]
    table = matrices["model.embed_tokens.weight"]
    assert sizes.skeleton_bytes - work.skeleton_bytes == pytest.approx(
        table * (model.dtype.itemsize if formats[1] == "native" else 1.05), rel=0.08
    )
