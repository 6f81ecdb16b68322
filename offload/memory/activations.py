"""An upper estimate of what one forward pass needs beside weights and KV cache."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

_FLOAT32 = 4
_INNER = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_hidden_size")
_CALL_ROWS = 512  # an expert may bring as many rows as the crossover beyond those that a call takes
_KERNEL_BYTES = 24 * 2**20
"""Compiled kernels and their scratch memory, made at the first prefill (measured: 15 to 28 MiB on 2 cores)."""

_LAYER_GRAPH_BYTES = 4 * 2**20
_POOL_BYTES = 64 * 2**20
"""Blocks of the allocator that only graphs use, and the libraries' workspaces for the stream that captures."""


def activation_bytes(config: PretrainedConfig, itemsize: int, context: int, chunk: int, eager_attention: bool) -> int:
    """Peak bytes of a forward pass of ``min(chunk, context)`` tokens against a full context.

    ``itemsize`` is that of the model's dtype. Counts the larger of attention and MoE block, since they do not run at
    the same time, plus what lives through both and the logits of one position.
    """
    text = config.get_text_config()
    tokens = min(chunk, context)
    hidden = text.hidden_size
    heads = _first(text, "num_attention_heads", default=1)
    width = _first(text, "head_dim", "v_head_dim", default=hidden // heads)
    inner = _first(text, *_INNER, default=4 * hidden)
    dense = max(_first(text, "intermediate_size", default=inner), _first(text, "shared_expert_intermediate_size"))
    top_k = experts_per_token(config)

    stream = tokens * hidden * (3 * itemsize + 2 * _FLOAT32)  # residual, normed and their float32 copies
    attention = tokens * heads * width * 6 * itemsize  # q, k, v before and after rotation, output
    attention += 2 * context * heads * width * itemsize  # keys and values repeated for every query head
    attention += tokens * context * itemsize  # the mask
    if eager_attention:
        attention += heads * tokens * context * (itemsize + 2 * _FLOAT32)  # the scores
    experts = tokens * top_k * hidden * itemsize  # products waiting to be summed
    experts += tokens * (3 * inner + 2 * hidden) * itemsize  # one expert that all tokens chose
    block = max(attention, experts + tokens * hidden * itemsize, tokens * 4 * dense * itemsize)
    logits = text.vocab_size * (itemsize + 4 * _FLOAT32)  # one position, through the samplers
    return stream + block + logits + _KERNEL_BYTES


def staged_bytes(config: PretrainedConfig, itemsize: int, context: int, chunk: int) -> int:
    """What quantised experts need beyond that: products wait in float32, and kernels hold copies of their input."""
    text = config.get_text_config()
    hidden = text.hidden_size
    inner = _first(text, *_INNER, default=4 * hidden)
    top_k = experts_per_token(config)
    rows = min(chunk, context) * top_k
    return rows * hidden * max(0, _FLOAT32 - itemsize) + min(rows, _CALL_ROWS) * (hidden + 2 * inner) * _FLOAT32


def host_compute_bytes(config: PretrainedConfig, itemsize: int, context: int, chunk: int) -> int:
    """RAM that experts of one pass take on the CPU beside a device, their weights apart: inputs and products as they
    wait, both once more as they are copied, one expert that all tokens chose, and the kernels' scratch memory.
    """
    text = config.get_text_config()
    tokens, hidden = min(chunk, context), text.hidden_size
    inner = _first(text, "moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", default=4 * hidden)
    top_k = experts_per_token(config)
    size = tokens * hidden * (2 * itemsize + (top_k + 2) * _FLOAT32)
    size += min(tokens * top_k, _CALL_ROWS) * (hidden + 2 * inner) * _FLOAT32
    return size + tokens * (3 * inner + 2 * hidden) * itemsize + _KERNEL_BYTES


def row_bytes(config: PretrainedConfig, itemsize: int, context: int, rows: int, kv_bytes: int) -> int:
    """What a pass of several rows needs beyond that of one: their logits, the noise of their draws, the states of
    attention joined again, and, where keys are made from latent states, those of all rows at once.

    ``kv_bytes`` are those of all rows' caches together.
    """
    text = config.get_text_config()
    size = rows * text.vocab_size * (2 * itemsize + _FLOAT32)
    if rank := getattr(text, "kv_lora_rank", None):
        heads = _first(text, "num_attention_heads", default=1)
        latent = (rank + _first(text, "qk_rope_head_dim")) * itemsize
        tokens = kv_bytes // max(1, latent * text.num_hidden_layers)
        width = _first(text, "qk_nope_head_dim") + _first(text, "qk_rope_head_dim") + _first(text, "v_head_dim")
        size += max(0, tokens - context) * heads * 2 * width * itemsize + tokens * latent
    return size


def graph_bytes(config: PretrainedConfig, itemsize: int, context: int, eager_attention: bool, fixed: int) -> int:
    """What graphs of a decode pass hold, at the whole context: the memory in which they run, their copies of states of
    ``fixed`` bytes, and what the driver keeps of each kernel.

    The last is an assumption, some 50 KiB for each of about 80 kernels a layer; what a card really takes is looked at.
    """
    layers = _first(config.get_text_config(), "num_hidden_layers", "num_layers", default=1)
    running = activation_bytes(config, itemsize, context, 1, eager_attention)
    return running + fixed + _POOL_BYTES + layers * _LAYER_GRAPH_BYTES


def experts_per_token(config: PretrainedConfig) -> int:
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk", "num_experts_per_token", "moe_top_k")
    return _first(config.get_text_config(), *names, default=2)


def _first(config: object, *names: str, default: int = 0) -> int:
    """The first of these attributes that is a number; families differ in their names, some have one per layer."""
    for name in names:
        value = _value(config, name)
        if isinstance(value, list | tuple) and value:
            value = max(v for v in value if isinstance(v, int))
        if isinstance(value, int):
            return value
    part = getattr(config, "ffn_config", None)  # DBRX has a config of its own for its experts
    return default if part is None else _first(part, *names, default=default)


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # what transformers raises for a field that differs from layer to layer
        return [getattr(layer, name, None) for layer in config.per_layer_config]
