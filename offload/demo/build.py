"""Fold a recipe into the dense weights and write a checkpoint that stock transformers loads as Qwen2-MoE.

How the dense FFN becomes an exact Qwen2-MoE layer: the router's logits differ so little that each of the E experts has
a softmax weight near 1/E (`norm_topk_prob` is off), so routed `down_proj` are multiplied by E; the gate of the shared
expert is a sigmoid of nearly 0, which is 1/2, so the shared `down_proj` is multiplied by 2. With top_k = E and no
corrections the result is the dense model up to rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.demo.errors import DemoBuildError
from offload.demo.gguf_dense import DenseConfig, DenseModel
from offload.demo.recipe import Recipe
from offload.demo.shape import CarveShape

BOS, EOS = 1, 2  # <|im_start|>, <|im_end|>
# Not 0: some runtimes compute sigmoid(x) as silu(x) / x.
_SHARED_GATE = 1e-6


def layer_tensors(dense: DenseModel, recipe: Recipe, layer: int) -> dict[str, Tensor]:
    """Return all bf16 tensors of one layer of the carved model under their checkpoint names."""
    c, s, t = dense.config, recipe.shape, recipe.tensors
    p = f"model.layers.{layer}."

    def weight(name: str) -> Tensor:
        return dense.tensors[f"{p}{name}.weight"].float()

    order = t["order"][layer].long()
    qkv = torch.cat([weight(f"self_attn.{name}_proj") for name in "qkv"]) + recipe.correction(layer, "qkv")
    gate_up = torch.cat([weight("mlp.gate_proj")[order], weight("mlp.up_proj")[order]])
    gate, up = (gate_up + recipe.correction(layer, "gate_up")).chunk(2)
    down = (weight("mlp.down_proj")[:, order] + recipe.correction(layer, "down")) * t["scale"][layer].float()
    out = {
        "input_layernorm.weight": t["norm1"][layer],
        "post_attention_layernorm.weight": t["norm2"][layer],
        "self_attn.o_proj.weight": weight("self_attn.o_proj") + recipe.correction(layer, "o"),
        "mlp.gate.weight": t["router"][layer],
        "mlp.shared_expert_gate.weight": torch.full((1, s.hidden), _SHARED_GATE),
    }
    sizes = [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
    for name, part in zip("qkv", qkv.split(sizes), strict=True):
        out[f"self_attn.{name}_proj.weight"] = part
        out[f"self_attn.{name}_proj.bias"] = torch.zeros(part.shape[0])
    blocks = [("shared_expert", slice(0, s.shared), 2.0)]
    for expert in range(s.experts):
        first = s.shared + expert * s.expert_size
        blocks.append((f"experts.{expert}", slice(first, first + s.expert_size), float(s.experts)))
    for name, rows, factor in blocks:
        out[f"mlp.{name}.gate_proj.weight"] = gate[rows]
        out[f"mlp.{name}.up_proj.weight"] = up[rows]
        out[f"mlp.{name}.down_proj.weight"] = down[:, rows] * factor
    # clone: a slice would keep the layer's float32 matrix alive until the file is written
    return {p + name: tensor.to(torch.bfloat16).contiguous().clone() for name, tensor in out.items()}


def fold(dense: DenseModel, recipe: Recipe, on_layer: Callable[[int, int], None] | None = None) -> dict[str, Tensor]:
    """Return the whole carved state dict in bf16; `on_layer(done, total)` follows the layers.

    Raises `DemoBuildError` if recipe and dense model are of different sizes.
    """
    s, c = recipe.shape, dense.config
    if (s.layers, s.hidden, s.ffn) != (c.layers, c.hidden, c.ffn):
        raise DemoBuildError(
            f"the demo recipe is for {s.layers} layers of {s.hidden} x {s.ffn}, the dense model has {c.layers} layers "
            f"of {c.hidden} x {c.ffn}"
        )
    state = {name: dense.tensors[name] for name in ("model.embed_tokens.weight", "model.norm.weight")}
    for layer in range(s.layers):
        state |= layer_tensors(dense, recipe, layer)
        if on_layer is not None:
            on_layer(layer + 1, s.layers)
    return state


def model_config(config: DenseConfig, shape: CarveShape) -> dict[str, Any]:
    """Return the contents of `config.json`."""
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "dtype": "bfloat16",
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "qkv_bias": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "moe_intermediate_size": shape.expert_size,
        "shared_expert_intermediate_size": shape.shared,
        "norm_topk_prob": False,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
    }


def write_checkpoint(state: dict[str, Tensor], config: DenseConfig, shape: CarveShape, folder: Path) -> None:
    """Write `model.safetensors`, `config.json` and `generation_config.json` into an existing folder."""
    from safetensors.torch import save_file

    save_file(state, str(folder / "model.safetensors"), {"format": "pt"})
    tokens = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
    for name, content in (("config.json", model_config(config, shape)), ("generation_config.json", tokens)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
