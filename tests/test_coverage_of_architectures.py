"""Every architecture with routed experts that the installed transformers has is run by a test, or it is said why not.

A release that adds or drops one fails here by name.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from offload.model.families.known import DO_NOT_RUN, RUNS
from tests.tiny_models import FURTHER_ARCHITECTURES, MULTIMODAL, TINY_ARCHITECTURES

TESTED = {*TINY_ARCHITECTURES, *FURTHER_ARCHITECTURES, *MULTIMODAL}
MODELS = Path(transformers.__file__).parent / "models"

# Folders of transformers' models whose experts are not behind its experts interface.
OUTSIDE = {
    "dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers",
    "vitpose_backbone",
}  # fmt: skip

# Folders that go by other names than those of their models, and what runs them.
RUN_AS = {
    "aria": "aria_text",
    "dots3_note": "dots3_note_text",
    "gemma4": "gemma4_text",
    "glm4v_moe": "glm4v_moe",
    "inkling": "inkling_text",
    "inkling2": "inkling2_text",
    "llama4": "llama4_text",
    "minimax_m3_vl": "minimax_m3_vl_text",
    "mistral4": "mistral3",
    "qwen3_omni_moe": "qwen3_omni_moe_thinker",
}

# Folders that no tiny model is built of.
NOT_BUILT = {
    "deepseek_ocr2": "the class of its vision part cannot be made from a config of its own",
    "diffusion_gemma": DO_NOT_RUN["diffusion_gemma"].reason,
    "doge": DO_NOT_RUN["doge"].reason,
    "ernie4_5_vl_moe": DO_NOT_RUN["ernie4_5_vl_moe"].reason,
    "minimax": DO_NOT_RUN["minimax"].reason,
    "nllb_moe": DO_NOT_RUN["nllb-moe"].reason,
    "openai_privacy_filter": DO_NOT_RUN["openai_privacy_filter"].reason,
    "switch_transformers": DO_NOT_RUN["switch_transformers"].reason,
    "vitpose_backbone": "it sees poses in images and has no text",
}


def folders_with_experts() -> set[str]:
    """Model folders with classes behind the experts interface, or with experts or a router of another kind."""
    interface = re.compile(r"^@use_experts_implementation", re.MULTILINE)
    other = re.compile(r"^class \w*(?:Experts|MoE|Moe|SparseMLP)\(nn\.\w+\)", re.MULTILINE)
    found = set()
    for file in MODELS.glob("*/modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        if interface.search(text) or other.search(text):
            found.add(file.parent.name)
    return found


def test_every_architecture_is_run_or_it_is_said_why_not() -> None:
    there = folders_with_experts()
    covered = {folder for folder in there if folder in TESTED or RUN_AS.get(folder) in TESTED}
    new = there - covered - NOT_BUILT.keys()
    assert not new, f"transformers {transformers.__version__} has architectures that no test runs: {sorted(new)}"
    assert not covered & NOT_BUILT.keys(), "these are said not to be built, and are"
    gone = (NOT_BUILT.keys() | RUN_AS.keys() | OUTSIDE) - there
    assert not gone, f"transformers {transformers.__version__} has no such architectures: {sorted(gone)}"


def test_what_stands_outside_the_interface_is_known() -> None:
    interface = re.compile(r"^@use_experts_implementation", re.MULTILINE)
    outside = {
        folder
        for folder in folders_with_experts()
        if not any(
            interface.search(file.read_text(encoding="utf-8")) for file in MODELS.glob(f"{folder}/modeling_*.py")
        )
    }
    assert outside == OUTSIDE


def test_what_is_said_to_run_is_what_the_tests_run() -> None:
    assert RUNS == TESTED
    assert not RUNS & DO_NOT_RUN.keys()


def test_the_manual_names_what_is_not_in_its_table() -> None:
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w-]+)`", page.partition("## Beside the table")[2]))
    assert {*FURTHER_ARCHITECTURES, *MULTIMODAL, *DO_NOT_RUN} <= named


@pytest.mark.parametrize("model_type", sorted(DO_NOT_RUN))
def test_what_is_said_instead_runs(model_type: str) -> None:
    assert model_type in CONFIG_MAPPING
    assert DO_NOT_RUN[model_type].nearest in RUNS
