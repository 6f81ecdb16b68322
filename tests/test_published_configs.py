"""Published models are planned from their ``config.json`` alone: as many weights and bytes as their makers say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offload.config import EngineSettings
from offload.opening import plan_only
from run_local import main
from tests.checkpoint.packs import ignore

CONFIGS = Path(__file__).parent / "data" / "configs"
PUBLISHED: dict[str, dict[str, Any]] = json.loads((CONFIGS / "published.json").read_text(encoding="utf-8"))
TIB = 2**40
NAMED = {
    "mixtral-8x7b", "mixtral-8x22b", "deepseek-v3", "deepseek-v2-lite", "kimi-k2", "kimi-k2-thinking", "qwen3-30b-a3b",
    "qwen3-235b-a22b", "qwen3-next-80b-a3b", "grok-1", "minimax-m2", "mistral-large-3", "gpt-oss-20b", "gpt-oss-120b",
    "kimi-k2.5", "glm-4.5", "glm-5", "deepseek-v3.2", "deepseek-v4-flash", "qwen3.5-35b-a3b",
}  # fmt: skip

LARGER = {"mixtral-8x22b", "kimi-k2", "qwen3-235b-a22b", "gpt-oss-120b", "glm-4.5"}
"""Like a smaller one but for their numbers; planned with the slow tests."""


def bytes_for_a_weight(config: dict[str, Any]) -> float:
    """Of an expert's matrices, from the formats' descriptions: codes, and scales for so many of them."""
    quantised = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if quantised is None:
        return 2
    if quantised["quant_method"] == "mxfp4":
        return 1 / 2 + 1 / 32
    weights = next(iter(quantised.get("config_groups", {}).values()), {}).get("weights", {})
    if weights.get("type") == "int":
        return weights["num_bits"] / 8 + 2 / weights["group_size"]
    rows, columns = quantised.get("weight_block_size") or weights["block_structure"]
    return 1 + 4 / (rows * columns)


def test_every_config_has_a_source_and_the_named_models_are_there() -> None:
    assert {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()} == set(PUBLISHED)
    assert set(PUBLISHED) >= NAMED
    for published in PUBLISHED.values():
        assert published["model"] and published["figures_from"] and published["parameters_from"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in LARGER else ()) for n in PUBLISHED])
def test_as_many_weights_and_bytes_as_published(name: str) -> None:
    published = PUBLISHED[name]
    config = json.loads((CONFIGS / name / "config.json").read_text(encoding="utf-8"))
    found = plan_only(EngineSettings(model=str(CONFIGS / name), context_tokens=64, ram=4 * TIB), ignore)
    assert found.weights.total == pytest.approx(published["parameters"], rel=0.01)
    sizes = found.plan.sizes
    experts = sizes.num_experts * sizes.slot_bytes
    assert experts == pytest.approx(found.weights.experts * bytes_for_a_weight(config), rel=0.01)
    if "checkpoint_bytes" in published:
        assert sizes.skeleton_bytes + experts == pytest.approx(published["checkpoint_bytes"], rel=0.01)
    if bytes_for_a_weight(config) == 2:
        assert sizes.skeleton_bytes == pytest.approx(2 * (found.weights.total - found.weights.experts), rel=0.01)
    assert found.plan.slots == sizes.num_experts, "it fits 4 TiB"


def test_the_command_needs_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", str(CONFIGS / "kimi-k2-thinking"), "--ram", "64GiB"]
    assert main(command) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[1] == "1026.4 billion weights, 99% of them in 23040 experts"
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["weights"], found["expert_weights"]) == (1_026_408_232_448, 23_040 * 3 * 7168 * 2048)
    assert found["bytes"]["expert_slots"] == found["expert_slots"] * found["slot_bytes"]
