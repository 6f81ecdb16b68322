"""Attention of one token and of many: the same figures as stock sdpa up to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offload.compute.kernels import Kernels
from offload.model import attention
from offload.model.attention import KEY_BLOCK, NAME, grouped_attention, whole_blocks, window_of
from offload.model.kv_cache import PreallocatedLayer
from tests.engines import GREEDY, finish, open_tiny
from tests.tiny_models import build_tiny


def filled(tokens: int, heads: int, width: int, capacity: int = 200) -> PreallocatedLayer:
    """A layer whose buffers held rubbish before its ``tokens`` random keys and values were written."""
    generator = torch.Generator().manual_seed(tokens)
    layer = PreallocatedLayer(capacity)
    states = torch.randn(1, heads, tokens, width, generator=generator)
    layer.lazy_initialization(states, states)
    for buffer in layer._buffers:
        buffer.fill_(torch.nan)
    for start in range(tokens):
        part = states[:, :, start : start + 1]
        layer.update(part, part.roll(1, -1))
    return layer


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (8, 2), (6, 1)])
def test_equals_sdpa(tokens: int, heads: int, shared: int) -> None:
    layer = filled(tokens, shared, 16)
    query = torch.randn(1, heads, 1, 16, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, layer.keys, layer.values, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(grouped_attention(query, layer.keys, layer.values, 0.3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 15, 16, 65, 200])
@pytest.mark.parametrize(("heads", "shared", "width"), [(4, 4, 16), (8, 2, 64), (6, 1, 128), (2, 1, 80), (2, 2, 512)])
def test_the_kernel_equals_sdpa(
    heads: int, shared: int, width: int, tokens: int, dtype: torch.dtype, kernels: Kernels
) -> None:
    layer = filled(tokens, shared, width)
    keys, values = layer.keys.to(dtype), layer.values.to(dtype)
    query = torch.randn(1, 1, heads, width, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), keys.double(), values.double(), scale=0.3, enable_gqa=True
    )
    for capacity in (tokens, 230):  # heads that follow each other, and heads with room between them
        room = [states.new_full((1, shared, capacity, width), torch.nan) for states in (keys, values)]
        for into, states in zip(room, (keys, values), strict=True):
            into[:, :, :tokens] = states
        output = torch.full((1, 1, heads, width), torch.nan, dtype=dtype)
        kernels.attend(query[0, :, 0], room[0][0, :, :tokens], room[1][0, :, :tokens], 0.3, output)
        torch.testing.assert_close(
            output.transpose(1, 2).double(), expected, atol=0.01 if dtype is torch.bfloat16 else 1e-5, rtol=1e-2
        )


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(kernels, "threads", request.param)
    return int(request.param)


def prompt_states(tokens: int, keys: int, heads: int, shared: int, width: int) -> tuple[torch.Tensor, ...]:
    """Query, key and value as the model code hands them out; what lies behind the last key is no number."""
    generator = torch.Generator().manual_seed(tokens + keys)
    query = torch.randn(1, tokens, heads, width, generator=generator).bfloat16().transpose(1, 2)
    both = torch.randn(2, 1, shared, keys + 70, width, generator=generator).bfloat16()
    both[:, :, :, keys:] = torch.nan
    return query, both[0, :, :, :keys], both[1, :, :, :keys]


def seen(tokens: int, keys: int, window: int) -> torch.Tensor:
    own, others = torch.arange(keys - tokens, keys)[:, None], torch.arange(keys)[None]
    return ((others <= own) & (others > own - (window or keys)))[None, None]


@pytest.mark.parametrize(("tokens", "keys"), [(2, 2), (3, 70), (16, 16), (63, 200), (64, 64), (65, 129), (150, 151)])
@pytest.mark.parametrize(("heads", "shared", "width"), [(4, 2, 16), (3, 1, 128), (2, 1, 80), (1, 1, 512)])
@pytest.mark.parametrize("window", [0, 1, 50])
def test_many_tokens_equal_sdpa(
    window: int, heads: int, shared: int, width: int, tokens: int, keys: int, threads: int, kernels: Kernels
) -> None:
    if not kernels.prompts:
        pytest.skip("this processor does not multiply bfloat16")
    query, key, value = prompt_states(tokens, keys, heads, shared, width)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), seen(tokens, keys, window), scale=0.1, enable_gqa=True
    )
    output = torch.full((1, tokens, heads, width), torch.nan, dtype=torch.bfloat16)
    kernels.attend_prompt(query[0], key[0], value[0], 0.1, window, output)
    error = output.transpose(1, 2).double() - expected
    assert error.square().mean().sqrt() < 3e-3 * expected.square().mean().sqrt() and error.abs().max() < 0.02


def test_many_tokens_with_scores_far_apart(kernels: Kernels) -> None:
    if not kernels.prompts:
        pytest.skip("this processor does not multiply bfloat16")
    query = torch.ones(1, 3, 16).bfloat16()
    keys = torch.tensor([-1e4, 0.0, 1e4, -3e38]).bfloat16()[None, :, None].expand(1, 4, 16).contiguous()
    values = torch.arange(4.0).bfloat16()[None, :, None].expand(1, 4, 16).contiguous()
    output = torch.empty(3, 1, 16).bfloat16()
    kernels.attend_prompt(query, keys, values, 1.0, None, output)
    assert output[:, 0, 0].tolist() == [1, 2, 2]
    values[0, 1] = torch.nan
    kernels.attend_prompt(query, keys, values, 1.0, None, output)
    assert output.isnan().all(), "as in sdpa: nothing times what is no number is none"


def test_what_a_mask_lets_a_token_see() -> None:
    assert window_of(seen(5, 9, 0), 5, 9) == 0
    assert window_of(seen(5, 9, 3), 5, 9) == 3
    assert window_of(seen(5, 9, 9), 5, 9) == 0
    assert window_of(seen(5, 9, 0).float(), 5, 9) is None, "added to the scores"
    assert window_of(torch.ones(1, 1, 5, 9, dtype=torch.bool), 5, 9) is None, "not causal"
    assert window_of(seen(5, 9, 0).expand(1, 2, 5, 9), 5, 9) is None, "a mask for each head"
    padded = seen(5, 9, 0)
    padded[..., 0] = False
    assert window_of(padded, 5, 9) is None


@pytest.mark.parametrize("model_type", ["olmoe", "qwen3_moe", "mixtral"])
def test_chunks_and_windows_as_stock_has_them(
    model_type: str, tmp_path: Path, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt in chunks: logits as with stock sdpa, up to the rounding of bfloat16."""
    if not kernels.prompts:
        pytest.skip("this processor does not multiply bfloat16")
    checkpoint = build_tiny(model_type, tmp_path / "model", dtype=torch.bfloat16)
    calls = []
    real = kernels.attend_prompt
    found = []
    for own in (True, False):
        monkeypatch.setattr(kernels, "prompts", own)
        monkeypatch.setattr(Kernels, "attend_prompt", lambda self, *args: calls.append(1) or real(*args))
        with open_tiny(checkpoint, tmp_path / "packs", format="int8", prefill_chunk=24) as engine:
            ids = engine.ordinary_ids()[:60]
            found.append(torch.cat([piece.clone() for piece in engine.score(ids)]))
        assert bool(calls) is own
        calls.clear()
    error = (found[0] - found[1]).square().mean(1).sqrt() / found[1].square().mean(1).sqrt()
    assert error.median() < 0.02  # at a few positions a router has two experts as likely


@pytest.mark.parametrize(("model_type", "alone"), [("qwen3_moe", True), ("jamba", False)])
def test_prompts_take_one_torch_thread_where_kernels_do_the_rest(
    model_type: str, alone: bool, tmp_path: Path, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (kernels.prompts and kernels.integer_dot):
        pytest.skip("this processor does not multiply bfloat16")
    checkpoint = build_tiny(model_type, tmp_path / "model", dtype=torch.bfloat16)
    monkeypatch.setattr(kernels, "threads", None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with open_tiny(checkpoint, tmp_path / "packs", format="int8", dense_format="int8") as engine:
            threads = []
            engine._model.lm_head.register_forward_pre_hook(lambda *_: threads.append(torch.get_num_threads()))
            _, done = finish(engine.generate("one two three", GREEDY))
            assert done.error is None
            assert threads[0] == (1 if alone else 2) and set(threads[1:]) <= {1}
            assert kernels.threads == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_scores_far_apart_and_values_that_are_no_numbers(kernels: Kernels) -> None:
    query = torch.ones(1, 16)
    keys = torch.tensor([-1e4, 0.0, 1e4])[None, :, None].expand(1, 3, 16).contiguous()
    values = torch.arange(3.0)[None, :, None].expand(1, 3, 16).contiguous()
    output = torch.empty(1, 16)
    kernels.attend(query, keys, values, 1.0, output)
    assert (output == 2).all()
    values[0, 1] = torch.nan
    kernels.attend(query, keys, values, 1.0, output)
    assert output.isnan().all(), "as in sdpa: nothing times what is no number is none"


def test_whole_blocks_are_views_where_the_buffer_goes_on() -> None:
    keys = filled(70, 2, 16).keys
    whole = whole_blocks(keys)
    assert whole.shape[2] == 2 * KEY_BLOCK and whole.data_ptr() == keys.data_ptr()
    assert torch.isfinite(whole).all()
    assert whole_blocks(keys.contiguous()).shape[2] == 70, "a tensor of its own ends where it ends"
    assert whole_blocks(filled(199, 2, 16, capacity=199).keys).shape[2] == 199


def test_runs_with_quantised_weights_use_it_and_native_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = build_tiny("qwen3_moe", tmp_path / "model")
    calls = []
    real = attention.grouped_attention
    monkeypatch.setattr(attention, "grouped_attention", lambda *args: calls.append(1) or real(*args))
    for weights, used in (("native", False), ("int8", True)):
        calls.clear()
        with open_tiny(checkpoint, tmp_path / "packs", format=weights, kernels="torch") as engine:
            _, done = finish(engine.generate("one two three", GREEDY))
            assert done.error is None
            assert (engine._model.config._attn_implementation == NAME) is used
        assert bool(calls) is used
