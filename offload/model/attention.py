"""Attention of one new token on the CPU, for runs whose weights are quantised anyway.

torch's scaled_dot_product_attention takes some 5 microseconds a key and layer there in bf16: at 500 tokens of context
it costs more than all experts (docs/performance.md). The compiled kernel takes a few microseconds a layer; without it
two batched products over the shared heads take a fifth. Both round differently, so runs in the native format keep what
stock transformers uses.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from offload.compute.kernels import Kernels
from offload.compute.kernels.binding import HEAD_STEP, MOST_HEAD_WIDTH

NAME = "run_local"
KEY_BLOCK = 64
"""Keys are taken in whole blocks, since the library compiles a product anew for every other size."""


def use_grouped_attention(model: PreTrainedModel, kernels: Kernels | None) -> None:
    """Let ``model`` decode with what stands below, if it attends by ``sdpa``. Changes the model's config."""
    if model.config.get_text_config()._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, partial(_attention, kernels))
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation(NAME)


def _attention(
    kernels: Kernels | None,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """``query`` [1, heads, tokens, width]; ``key``, ``value`` [1, shared heads, keys, width].

    Returns [1, tokens, heads, width].
    """
    special = query.is_meta or any(options.get(name) is not None for name in _SPECIAL)
    if query.shape[0] != 1 or query.shape[2] != 1 or attention_mask is not None or special:
        stock: Any = AttentionInterface()["sdpa"]
        return stock(module, query, key, value, attention_mask, scaling=scaling, **options)  # type: ignore[no-any-return]
    if kernels is not None and _suits(query) and _suits(key) and _suits(value):
        output = query.new_empty(1, 1, query.shape[1], value.shape[3])
        kernels.attend(query[0, :, 0], key[0], value[0], query.shape[3] ** -0.5 if scaling is None else scaling, output)
        return output, None
    return grouped_attention(query, key, value, scaling).transpose(1, 2), None


def _suits(states: torch.Tensor) -> bool:
    width = states.shape[3]
    return (
        width % HEAD_STEP == 0
        and width <= MOST_HEAD_WIDTH
        and states.dtype in (torch.float32, torch.bfloat16)
        and states.stride(3) == 1
    )


_SPECIAL = ("softcap", "position_bias", "cache")
"""Of all the options that attention functions are called with, those that change what stock sdpa does for one token."""


def grouped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """``query`` [1, heads, 1, width] over all keys [1, shared heads, keys, width] -> [1, heads, 1, value's width]."""
    heads, width = query.shape[1], query.shape[3]
    shared, count = key.shape[1], key.shape[2]
    key, value = whole_blocks(key)[0], whole_blocks(value)[0]
    size = min(key.shape[1], value.shape[1])
    scores = torch.bmm(query.reshape(shared, heads // shared, width), key[:, :size].transpose(1, 2)).float()
    scores *= width**-0.5 if scaling is None else scaling
    scores[:, :, count:] = -torch.inf
    weights = torch.softmax(scores, -1).to(value.dtype)
    return torch.bmm(weights, value[:, :size]).view(1, heads, 1, value.shape[2])


def whole_blocks(states: torch.Tensor) -> torch.Tensor:
    """``states`` [1, heads, keys, width] up to the end of its last block, where it is a view into a longer buffer.

    What stands there beyond is finite: :class:`offload.model.kv_cache.PreallocatedLayer` sees to it.
    """
    _, heads, count, width = states.shape
    whole = -(-count // KEY_BLOCK) * KEY_BLOCK
    if whole == count or whole * states.stride(2) > states.stride(1) or states.stride(3) != 1:
        return states
    return states.as_strided((1, heads, whole, width), states.stride())
