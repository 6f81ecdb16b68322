"""Rows that share forward passes get the logits that each would get by itself, up to rounding."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from offload.errors import ModelError
from offload.model.families import rows_may_share
from offload.model.kv_cache import new_kv_cache
from offload.model.packed import RowAttention, Segment, can_pack
from tests.tiny_models import TINY_ARCHITECTURES, build_tiny, load_reference, tiny_config

CAPACITY = 192
PROMPTS = [list(range(20, 20 + length)) for length in (5, 97, 1, 130)]
ANSWERS = [random.Random(row).choices(range(10, 300), k=4) for row in range(len(PROMPTS))]
MEASURED_ERROR = 4e-6
"""Largest difference seen in float32, relative to the largest logit: 2.6e-6 (gemma4_text), most are below 1e-6."""


def alone(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Logits of the last prompt token and of each token of the answer, [1 + answer, V]."""
    cache = new_kv_cache(model.config, CAPACITY)
    steps = [prompt, *([token] for token in answer)]
    return torch.stack(
        [model(input_ids=torch.tensor([step]), past_key_values=cache, use_cache=True).logits[0, -1] for step in steps]
    )


@pytest.mark.parametrize("architecture", [name for name in TINY_ARCHITECTURES if rows_may_share(name)])
@torch.inference_mode()
def test_every_family_that_shares_passes_computes_each_row_as_if_alone(architecture: str, tmp_path: Path) -> None:
    model = load_reference(build_tiny(architecture, tmp_path / "checkpoint", tokenizer=False))
    caches = [new_kv_cache(model.config, CAPACITY) for _ in PROMPTS]
    assert can_pack(model, caches[0])
    expected = [alone(model, prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    attention = RowAttention(model)
    found: list[list[torch.Tensor]] = [[] for _ in PROMPTS]
    with attention.entered():
        attention.run([Segment(caches[1], PROMPTS[1][:90]), Segment(caches[3], PROMPTS[3][:7])])
        begun = [0, 90, 0, 7]
        # ragged: the ends of four prompts in one pass
        first = attention.run([Segment(c, p[b:]) for c, p, b in zip(caches, PROMPTS, begun, strict=True)])
        for row, logits in enumerate(first):
            found[row].append(logits)
        for step in range(len(ANSWERS[0])):
            logits = attention.run([Segment(c, [a[step]]) for c, a in zip(caches, ANSWERS, strict=True)])
            for row in range(len(PROMPTS)):
                found[row].append(logits[row])
    for row, logits in enumerate(expected):
        error = (torch.stack(found[row]) - logits).abs().max() / logits.abs().max()
        assert error < MEASURED_ERROR
    after = alone(model, PROMPTS[0], ANSWERS[0])
    assert torch.equal(after, expected[0]), "the model runs single sequences again, bit for bit"


@torch.inference_mode()
def test_a_row_does_not_depend_on_what_stands_in_the_others(tmp_path: Path) -> None:
    model = load_reference(build_tiny("olmoe", tmp_path / "checkpoint", tokenizer=False))
    attention, results = RowAttention(model), []
    for other in (PROMPTS[1], PROMPTS[1][::-1]):
        caches = [new_kv_cache(model.config, CAPACITY) for _ in range(2)]
        with attention.entered():
            results.append(attention.run([Segment(caches[0], PROMPTS[0]), Segment(caches[1], other)])[0])
    assert torch.allclose(*results, rtol=0, atol=MEASURED_ERROR * float(results[0].abs().max()))
    assert not results[0].isnan().any()


@pytest.mark.parametrize("architecture", [name for name in TINY_ARCHITECTURES if not rows_may_share(name)])
def test_other_families_do_not(architecture: str) -> None:
    config = tiny_config(architecture)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config)
            cache = new_kv_cache(config, 8)
        except (KeyError, ValueError):  # families whose cache is made by the model itself
            return
    assert not can_pack(model, cache)


@torch.inference_mode()
def test_attention_that_does_not_take_the_cached_keys_is_refused(tmp_path: Path) -> None:
    model = load_reference(build_tiny("deepseek_v2", tmp_path / "checkpoint", tokenizer=False))
    attention = RowAttention(model)
    attention.joins = False  # as a family would look that makes keys of its own after the cache, and does not say so
    cache = new_kv_cache(model.config, CAPACITY)
    with attention.entered(), pytest.raises(ModelError, match="use --batch-size 1"):
        attention.run([Segment(cache, PROMPTS[0])])
    assert model.config._attn_implementation == "sdpa"
