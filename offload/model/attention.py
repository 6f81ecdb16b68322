"""Attention on the CPU, for runs whose weights are quantised anyway.

torch's scaled_dot_product_attention takes some 5 microseconds a key and layer there for one new token in bf16: at 500
tokens of context it costs more than all experts (docs/performance.md). The compiled kernel takes a few microseconds a
layer; without it two batched products over the shared heads take a fifth. For the tokens of a prompt it gives a sixth
to a third of what the processor's bfloat16 products do, a kernel of its own three quarters. All of them round
differently, so runs in the native format keep what stock transformers uses.
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


def attends_in_kernels(model: PreTrainedModel, kernels: Kernels) -> bool:
    """Whether nothing large is left to torch in a prompt's passes, if ``model`` has no layers but plain attention."""
    own = model.config.get_text_config()._attn_implementation == NAME
    return own and kernels.prompts and kernels.integer_dot and model.dtype == torch.bfloat16


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
    if query.shape[0] == 1 and not special:
        suits = kernels if kernels is not None and _suits(query) and _suits(key) and _suits(value) else None
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        if query.shape[2] > 1:
            if suits is not None and suits.prompts and query.dtype == torch.bfloat16:
                window = _seen(module, attention_mask, query.shape[2], key.shape[2], options.get("is_causal"))
                if window is not None:
                    shape = (1, query.shape[2], query.shape[1], value.shape[3])
                    output = suits.states.empty(shape, query.dtype)
                    suits.attend_prompt(query[0], key[0], value[0], scale, window, output)
                    return output, None
        elif attention_mask is None:
            if suits is None:
                return grouped_attention(query, key, value, scaling).transpose(1, 2), None
            output = query.new_empty(1, 1, query.shape[1], value.shape[3])
            suits.attend(query[0, :, 0], key[0], value[0], scale, output)
            return output, None
    stock: Any = AttentionInterface()["sdpa"]
    return stock(module, query, key, value, attention_mask, scaling=scaling, **options)  # type: ignore[no-any-return]


def _seen(
    module: torch.nn.Module, mask: torch.Tensor | None, tokens: int, keys: int, causal: bool | None
) -> int | None:
    """How many positions a token sees, its own included, of those up to its own: 0 for all. None if it is not so.

    Without a mask stock sdpa counts from the first key; ``causal`` is the option of that name.
    """
    if mask is None:
        causal = getattr(module, "is_causal", True) if causal is None else causal
        return 0 if causal and tokens == keys else None
    found: int | None = mask.__dict__.get(_WINDOW, -1)  # a mask serves many layers
    if found == -1:
        found = mask.__dict__[_WINDOW] = window_of(mask, tokens, keys)
    return found


def window_of(mask: torch.Tensor, tokens: int, keys: int) -> int | None:
    """How many positions a mask [1, 1, tokens, keys] lets each of the last ``tokens`` see, its own included, where it
    lets it see those before; 0 for all. None if the mask is anything else.
    """
    if mask.dtype != torch.bool or mask.shape != (1, 1, tokens, keys):
        return None
    seen = mask[0, 0]
    window = int(seen[-1].sum())
    own = torch.arange(keys - tokens, keys)[:, None]
    others = torch.arange(keys)[None]
    expected = others <= own
    if window < keys:
        expected &= others > own - window
    if not torch.equal(seen, expected):
        return None
    return window if window < keys else 0


def _suits(states: torch.Tensor) -> bool:
    width = states.shape[3]
    return (
        width % HEAD_STEP == 0
        and width <= MOST_HEAD_WIDTH
        and states.dtype in (torch.float32, torch.bfloat16)
        and states.stride(3) == 1
    )


_WINDOW = "run_local_window"
_SPECIAL = ("softcap", "position_bias", "cache")
"""Of all the options that attention functions are called with, those that change what stock sdpa does."""


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
