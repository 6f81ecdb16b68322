"""The tiny checkpoints are what the other tests build on: whole, loadable, and sensitive to every part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_models import (
    EOS_ID,
    TINY_ARCHITECTURES,
    VOCAB_SIZE,
    build_tiny,
    load_reference,
    reference_logits,
)

IDS = torch.tensor([[9, 41, 77, 130, 8, 201, 300, 15, 99, 250], [31, 12, 270, 66, 45, 180, 93, 222, 10, 11]])
REQUIRED = {
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "glm4_moe",
    "minimax_m2", "granitemoe", "phimoe", "jamba", "lfm2_moe", "nemotron_h", "kimi_linear", "ernie4_5_moe",
}  # fmt: skip


def experts_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "is_concatenated")]


def last_matrices(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The experts' second matrices, layer by layer, whatever the family calls them."""
    ends = ("experts.down_proj", "experts.mlp.w2", "mlp.output_linear.weight")
    return [parameter for name, parameter in model.named_parameters() if name.endswith(ends)]


def test_the_zoo_is_large_and_holds_what_must_be_supported() -> None:
    assert len(TINY_ARCHITECTURES) >= 24
    assert set(TINY_ARCHITECTURES) >= REQUIRED


def test_the_zoo_covers_every_kind_of_experts_module(tmp_path: Path) -> None:
    kinds = set()
    for name in ("mixtral", "gpt_oss", "aria_text", "nemotron_h"):
        module = experts_modules(load_reference(build_tiny(name, tmp_path / name, tokenizer=False)))[0]
        kinds.add((module.has_gate, module.has_bias, module.is_transposed, module.is_concatenated))
    assert len(kinds) == 4


@pytest.mark.parametrize("model_type", TINY_ARCHITECTURES)
def test_architecture(model_type: str, tmp_path: Path) -> None:
    folder = build_tiny(model_type, tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 2

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", experts_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    matrices = last_matrices(model)
    assert matrices
    assert model.generation_config.eos_token_id == EOS_ID

    prefill, *steps = reference_logits(folder, IDS, [7, 8])
    assert prefill.shape == (2, IDS.shape[1], VOCAB_SIZE) and all(step.shape == (2, 1, VOCAB_SIZE) for step in steps)
    assert all(bool(logits.isfinite().all()) for logits in (prefill, *steps))
    assert (prefill[:, 1:] - prefill[:, :-1]).abs().amax(-1).min() > 0.05

    # The cached steps say what one long forward pass says, so that neither can be wrong alone.
    longer = torch.cat([IDS, torch.tensor([[7, 8]] * 2)], dim=1)
    with torch.inference_mode():
        whole = model.eval()(input_ids=longer, use_cache=False).logits
    torch.testing.assert_close(torch.cat([prefill, *steps], dim=1), whole, atol=1e-4, rtol=1e-4)

    # A damaged expert shows, in the first layer and in the last.
    for matrix in {matrices[0], matrices[-1]}:
        with torch.no_grad():
            matrix.neg_()
            damaged = model(input_ids=IDS, use_cache=False).logits
            matrix.neg_()
        assert (damaged - prefill).abs().max() > 0.02


def test_tokenizer_fits_the_vocabulary_and_round_trips(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(build_tiny("qwen3_moe", tmp_path))
    text = "Zoë asks: what is the capital of France?\n\t漢字 🙂"
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == EOS_ID
    prompt = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_same_seed_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    first, second, third = (
        reference_logits(build_tiny("qwen3_moe", tmp_path / str(number), seed=seed, tokenizer=False), IDS, [])[0]
        for number, seed in enumerate((3, 3, 4))
    )
    assert torch.equal(first, second)
    assert not torch.allclose(first, third)


def test_bfloat16_checkpoint(tmp_path: Path) -> None:
    folder = build_tiny("deepseek_v3", tmp_path, dtype=torch.bfloat16, tokenizer=False)
    assert experts_modules(load_reference(folder))[0].down_proj.dtype == torch.bfloat16
    assert bool(reference_logits(folder, IDS, [5])[0].isfinite().all())
