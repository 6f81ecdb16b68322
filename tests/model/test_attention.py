"""Attention of one token: the same figures as stock sdpa up to rounding, on whole blocks of the KV cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
        with open_tiny(checkpoint, tmp_path / "packs", format=weights) as engine:
            _, done = finish(engine.generate("one two three", GREEDY))
            assert done.error is None
            assert (engine._model.config._attn_implementation == NAME) is used
        assert bool(calls) is used
