"""The preallocated KV cache equals transformers' own, and keeps the longest common prefix between turns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from offload.checkpoint.source import open_source
from offload.model.kv_cache import (
    FP8,
    Fp8Layer,
    KVState,
    PreallocatedLayer,
    decoded,
    kv_cache_bytes,
    kv_row_memory,
    new_kv_cache,
)
from tests.tiny_models import TINY_ARCHITECTURES, build_tiny, load_reference

IDS = list(range(20, 60))


def test_a_preallocated_layer_holds_what_a_dynamic_one_holds() -> None:
    from transformers.cache_utils import DynamicLayer

    ours, theirs = PreallocatedLayer(16), DynamicLayer()
    for tokens in (5, 1, 3):
        keys, values = torch.randn(1, 2, tokens, 4), torch.randn(1, 2, tokens, 8)
        for mine, stock in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
            assert torch.equal(mine, stock)
        if tokens == 1:
            ours.crop(-2)
            theirs.crop(-2)
    assert ours.get_seq_length() == theirs.get_seq_length() == 7
    buffer = ours.keys.untyped_storage().data_ptr()
    ours.update(torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 8))
    assert ours.keys.untyped_storage().data_ptr() == buffer, "it never grows"
    with pytest.raises(ValueError, match="17 tokens do not fit"):
        ours.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 8))


def test_eight_bits_keep_states_of_any_size() -> None:
    """Later states may be a thousand times the first, and one head's need not suit another's."""
    ours = Fp8Layer(16)
    chance = torch.Generator().manual_seed(1)
    states = torch.randn(1, 2, 9, 8, generator=chance, dtype=torch.bfloat16)
    states[:, :, 5:] *= 1000
    states[:, 1] *= 0.001
    states[:, :, 3] = 0
    ours.update(states[:, :, :5], -states[:, :, :5])
    keys, values = ours.update(states[:, :, 5:], -states[:, :, 5:])
    assert keys.dtype == torch.bfloat16 and torch.equal(keys, -values)
    error = (keys.float() - states.float()).abs()
    assert (error <= states.float().abs() * 2**-4 + states.float().abs().amax(-1, keepdim=True) * 2**-9).all()
    assert ours.get_seq_length() == 9
    ours.crop(-3)
    assert torch.equal(ours.update(states[:, :, 6:], states[:, :, 6:])[0], keys)
    copied = Fp8Layer(12)
    copied.copy_from(ours, 6)
    assert torch.equal(copied.update(states[:, :, 6:], states[:, :, 6:])[0], keys)
    with pytest.raises(ValueError, match="do not fit"):
        ours.update(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_eight_bits_are_decoded_as_torch_does(dtype: torch.dtype) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8)
    codes = numbers[numbers.float().isfinite()].repeat(3).view(3, -1)[:, 1:]  # not one piece of memory
    assert codes.numel() == 3 * 253
    assert torch.equal(decoded(codes, dtype), codes.to(dtype))
    assert torch.equal(decoded(codes, dtype).signbit(), codes.to(dtype).signbit())


@pytest.mark.parametrize("architecture", ["olmoe", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_eight_bits_are_counted_as_what_they_take(architecture: str, tmp_path: Path) -> None:
    folder = build_tiny(architecture, tmp_path, dtype=torch.bfloat16, tokenizer=False)
    memory = kv_row_memory(open_source(folder).model, 96, "fp8")
    state = KVState(load_reference(folder).config, 96, kind="fp8")
    run(load_reference(folder), state, IDS)
    full = [layer for layer in state.cache.layers if isinstance(layer, Fp8Layer)]
    assert full
    held = sum(part.nbytes for layer in full for part in (*layer._buffers, *layer._scales))
    assert memory.per_token * 96 == pytest.approx(held, rel=0.02)
    plain = kv_row_memory(open_source(folder).model, 96)
    assert memory.per_token < plain.per_token and memory.fixed == plain.fixed
    assert 0 < memory.unpacked <= plain.per_token and plain.unpacked == 0


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_a_changed_conversation_in_eight_bits(architecture: str, tmp_path: Path) -> None:
    model = load_reference(build_tiny(architecture, tmp_path))
    state = KVState(model.config, 128, kind="fp8")
    for prompt in (IDS[:30], IDS[:12] + [7] * 9, IDS[:12] + [7] * 9 + [8, 9, 10]):
        kept = state.keep_prefix(prompt)
        logits = run(model, state, prompt[kept:])
        exact = run(model, KVState(model.config, 128), prompt)
        assert 0 < (logits - exact).abs().max() < 0.1 * exact.abs().max(), "changed, and little"


def run(model: object, state: KVState, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([tokens]), past_key_values=state.cache, use_cache=True)  # type: ignore[operator]
    state.tokens += tokens
    logits: torch.Tensor = output.logits[0, -1]
    return logits


@pytest.mark.parametrize(
    "architecture", ["qwen3_moe", "gpt_oss", "qwen3_next", "lfm2_moe", "deepseek_v3", "zaya", "jamba"]
)
def test_a_changed_conversation_gives_the_logits_of_a_fresh_one(architecture: str, tmp_path: Path) -> None:
    """Edit (a shorter common prefix), retry (only the last token), go on (all kept), start over (nothing kept)."""
    model = load_reference(build_tiny(architecture, tmp_path))
    state = KVState(model.config, 128, whole_prompts=architecture == "jamba")
    for prompt in (IDS[:30], IDS[:12] + [7] * 9, IDS[:12] + [7] * 9, IDS[:12] + [7] * 9 + [8, 9, 10], [99, 98, 97]):
        kept = state.keep_prefix(prompt)
        assert kept == len(state.tokens) < len(prompt)
        assert state.tokens == prompt[:kept]
        logits = run(model, state, prompt[kept:])
        expected = run(model, KVState(model.config, 128), prompt)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


def test_a_layer_with_states_of_its_own_starts_anew(tmp_path: Path) -> None:
    """DeepSeek V4 sums up keys of several tokens, and what is summed up cannot be taken apart again."""
    model = load_reference(build_tiny("deepseek_v4", tmp_path))
    state = KVState(model.config, 128)
    for prompt in (IDS[:7], IDS[:5] + [7], IDS[:5] + [7, 8, 9]):  # within the window, from which crop would take tokens
        kept = state.keep_prefix(prompt)
        assert kept in (0, 6), "all or nothing"
        logits = run(model, state, prompt[kept:])
        torch.testing.assert_close(logits, run(model, KVState(model.config, 128), prompt), rtol=1e-3, atol=1e-4)


def test_an_attention_cache_keeps_the_common_prefix(tmp_path: Path) -> None:
    model = load_reference(build_tiny("qwen3_moe", tmp_path))
    state = KVState(model.config, 64)
    run(model, state, IDS[:20])
    assert state.keep_prefix(IDS[:11] + [5, 6]) == 11
    assert state.keep_prefix(IDS[:11]) == 10, "the last prompt token is computed again for its logits"


@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen3_next"])
def test_a_pass_that_stopped_half_way_is_forgotten(architecture: str, tmp_path: Path) -> None:
    model = load_reference(build_tiny(architecture, tmp_path))
    state = KVState(model.config, 64)
    run(model, state, IDS[:10])

    def stop(*args: object) -> None:
        raise RuntimeError("half-way")

    hook = model.model.layers[2].register_forward_hook(stop)
    with pytest.raises(RuntimeError, match="half-way"):
        run(model, state, IDS[10:14])
    hook.remove()
    state.after_failure()
    kept = state.keep_prefix(IDS[:14])
    assert kept == (10 if architecture == "qwen3_moe" else 0)
    expected = run(model, KVState(model.config, 64), IDS[:14])
    torch.testing.assert_close(run(model, state, IDS[kept:14]), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_the_planned_size_is_the_real_one(architecture: str, tmp_path: Path) -> None:
    ids = [20 + token % 40 for token in range(100)]  # more than it takes to measure layers that grow evenly
    folder = build_tiny(architecture, tmp_path)
    source = open_source(folder)
    model = load_reference(folder)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
    seen: dict[int, int] = {}
    for layer in cache.layers:
        for value in layer.__dict__.values():
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            seen |= {id(t): t.numel() * t.element_size() for t in parts if isinstance(t, torch.Tensor)}
    real = sum(seen.values())
    assert real <= kv_cache_bytes(source.model, len(ids)) <= 1.15 * real


def test_only_plain_attention_layers_are_preallocated(tmp_path: Path) -> None:
    model = load_reference(build_tiny("gpt_oss", tmp_path))
    kinds = [type(layer).__name__ for layer in new_kv_cache(model.config, 32).layers]
    assert set(kinds) == {"PreallocatedLayer", "DynamicSlidingWindowLayer"}
