"""A dense model of a few thousand weights, and recipes for it."""

from __future__ import annotations

import torch
from torch import Tensor

from offload.demo.gguf_dense import DenseConfig, DenseModel
from offload.demo.recipe import CORRECTED, Recipe, make_recipe
from offload.demo.shape import CarveShape

CONFIG = DenseConfig(
    layers=2, hidden=32, ffn=48, heads=4, kv_heads=2, head_dim=8, vocab=64, context=64, rope_theta=1e4, norm_eps=1e-5
)


def shape(top_k: int) -> CarveShape:
    """16 shared neurons and 4 experts of 8."""
    return CarveShape(layers=2, hidden=32, ffn=48, shared=16, experts=4, expert_size=8, top_k=top_k)


def dense(seed: int = 0) -> DenseModel:
    """Random bf16 weights."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (48, 32),
        "mlp.up_proj": (48, 32),
        "mlp.down_proj": (32, 48),
    }

    def draw(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator) / size[-1] ** 0.5).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": draw(64, 32), "model.norm.weight": 1 + draw(32)}
    for layer in range(CONFIG.layers):
        p = f"model.layers.{layer}."
        tensors |= {f"{p}{name}.weight": draw(*size) for name, size in sizes.items()}
        tensors |= {f"{p}{name}.weight": 1 + draw(32) for name in ("input_layernorm", "post_attention_layernorm")}
    return DenseModel(CONFIG, tensors)


def params(model: DenseModel, strength: float, router: float, seed: int = 1) -> list[dict[str, Tensor]]:
    """Trained parameters as `distil/train.py` leaves them: corrections of size `strength`, router of size `router`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"qkv": (64, 32), "o": (32, 32), "gate_up": (96, 32), "down": (32, 48)}
    out = []
    for layer in range(CONFIG.layers):
        p = f"model.layers.{layer}."
        one = {
            "norm1": model.tensors[p + "input_layernorm.weight"].float(),
            "norm2": model.tensors[p + "post_attention_layernorm.weight"].float(),
            "scale": torch.ones(48),
            "router": router * torch.randn(4, 32, generator=generator),
        }
        for name in CORRECTED:
            rows, columns = sizes[name]
            one[name + "_a"] = torch.randn(3, columns, generator=generator)
            one[name + "_b"] = strength * torch.randn(rows, 3, generator=generator)
        out.append(one)
    return out


def order(seed: int = 2) -> Tensor:
    """A random order of the neurons for each layer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(48, generator=generator) for _ in range(CONFIG.layers)])


def recipe(model: DenseModel, top_k: int, strength: float = 0.0, router: float = 0.0) -> Recipe:
    """A recipe for `model`."""
    return make_recipe(shape(top_k), order(), params(model, strength, router), {"model": "tiny"})
