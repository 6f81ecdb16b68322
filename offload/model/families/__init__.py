"""Where a family differs from the rule.

The rule for experts, read from the ``eager`` forward of all 64 classes behind transformers' experts interface (5.23):
products are summed in the dtype of the hidden states. The exceptions are told by the name of the experts class; gates,
biases and norms are the module's own.
"""

from __future__ import annotations

from typing import Any

import torch

_SUM_IN_ROUTER_DTYPE = frozenset({"NemotronHExperts"})
_SUM_IN_FLOAT32 = frozenset({"InklingExperts", "Inkling2Experts"})


def sum_dtype(module: Any, hidden: torch.Tensor, top_k_weights: torch.Tensor) -> torch.dtype:
    """The dtype in which ``eager`` sums the experts' products."""
    name = type(module).__name__
    if name in _SUM_IN_ROUTER_DTYPE:
        return top_k_weights.dtype
    return torch.float32 if name in _SUM_IN_FLOAT32 else hidden.dtype


_WHOLE_PROMPTS = frozenset({"jamba"})


def needs_whole_prompts(model_type: str) -> bool:
    """Whether prompts must be prefilled in one piece, from an empty KV cache.

    Jamba's Mamba layers ignore their state when they get several tokens at once (transformers 5.23, float32: logits
    6 % off after a chunked prefill; every other family is exact to rounding).
    """
    return model_type in _WHOLE_PROMPTS


_ROWS_MAY_SHARE = frozenset(
    {
        "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "glm4_moe", "minimax_m2",
        "granitemoe", "phimoe", "ernie4_5_moe", "gemma4_text", "aria_text", "beam", "cohere2_moe", "hunyuan_v1_moe",
        "mimo_v2_flash", "afmoe", "laguna", "dbrx", "longcat_flash", "grok-1",
    }
)  # fmt: skip


def rows_may_share(model_type: str) -> bool:
    """Whether rows of a batch may share one forward pass: checked for these, with tiny models of each.

    Recurrent layers, indexers and compressed keys belong to one row in ways that attention does not show.
    """
    return model_type in _ROWS_MAY_SHARE


def caches_latents(config: Any) -> bool:
    """Whether keys and values are made from cached latent states in each forward pass (multi-head latent attention)."""
    return bool(getattr(config, "kv_lora_rank", None))
