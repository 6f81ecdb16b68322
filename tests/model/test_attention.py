"""Attention of one token: the same figures as stock sdpa up to rounding, on whole blocks of the KV cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offload.compute.kernels import Kernels
from offload.model import attention
from offload.model.attention import KEY_BLOCK, NAME, grouped_attention, whole_blocks
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
