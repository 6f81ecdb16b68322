"""The carved model in a form that is quick to train on a CPU: all neurons computed, the unselected experts masked.

The base weights are frozen bf16 and serve the teacher as well; what is trained is of low rank (Hu et al., LoRA, 2021)
plus router, norms and a scale for each neuron.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from offload.demo.gguf_dense import DenseConfig, DenseModel
from offload.demo.shape import CarveShape

BF16 = torch.bfloat16


@dataclass
class FrozenLayer:
    """One layer's bf16 weights, `[out, in]`, FFN neurons in the carved order (shared first, then expert by expert)."""

    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor
    norm1: Tensor
    norm2: Tensor


def freeze(dense: DenseModel, order: Tensor) -> list[FrozenLayer]:
    """Lay out the dense weights for training; `order` int64 `[layers, ffn]` is the carved order of the neurons."""
    layers = []
    for index in range(dense.config.layers):
        p, t = f"model.layers.{index}.", dense.tensors
        neurons = order[index]
        layers.append(
            FrozenLayer(
                qkv=torch.cat([t[f"{p}self_attn.{name}_proj.weight"] for name in "qkv"]),
                o=t[p + "self_attn.o_proj.weight"],
                gate_up=torch.cat([t[f"{p}mlp.{name}_proj.weight"][neurons] for name in ("gate", "up")]),
                down=t[p + "mlp.down_proj.weight"][:, neurons].contiguous(),
                norm1=t[p + "input_layernorm.weight"].float(),
                norm2=t[p + "post_attention_layernorm.weight"].float(),
            )
        )
    return layers


def rotary_table(config: DenseConfig, length: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin, float32 `[length, head_dim]`."""
    inverse = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    angles = torch.outer(torch.arange(length).float(), inverse)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight).to(BF16)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def _pair(p: dict[str, Tensor] | None, name: str) -> tuple[Tensor, Tensor] | None:
    return None if p is None or name + "_a" not in p else (p[name + "_a"], p[name + "_b"])


def _linear(x: Tensor, weight: Tensor, lora: tuple[Tensor, Tensor] | None) -> Tensor:
    out = F.linear(x, weight)
    if lora is not None:
        out = out + F.linear(F.linear(x, lora[0].to(BF16)), lora[1].to(BF16))
    return out


def gates(x: Tensor, router: Tensor, shape: CarveShape, tau: float) -> tuple[Tensor, Tensor]:
    """Return the gate of every expert `[.., experts]` (0 where not selected) and the selected ids `[.., top_k]`.

    A selected expert's gate is its softmax weight times the number of experts. Backward, an expert that was not
    selected gets the gradient of a soft threshold of temperature `tau` (in standard deviations of the logits): a
    straight-through estimate, without which the router would never hear of the experts that it leaves out.
    """
    logits = F.linear(x.float(), router)
    weights, ids = logits.softmax(-1).topk(shape.top_k, -1)
    hard = torch.zeros_like(logits).scatter(-1, ids, weights * shape.experts)
    if not torch.is_grad_enabled() or tau <= 0:
        return hard, ids
    spread = logits.detach().std(-1, keepdim=True)
    threshold = logits.detach().topk(shape.top_k + 1, -1).values[..., -2:].mean(-1, keepdim=True)
    # The estimate is for the router alone: let into the residual stream, its bias would reach every layer below.
    soft = torch.sigmoid((F.linear(x.detach().float(), router) - threshold) / (spread * tau))
    return hard + (soft - soft.detach()), ids


class Carved:
    """Forward passes of teacher and student over the same frozen weights."""

    def __init__(self, dense: DenseModel, shape: CarveShape, order: Tensor, length: int = 512) -> None:
        self.config, self.shape = dense.config, shape
        self.layers = freeze(dense, order)
        self.embedding = dense.tensors["model.embed_tokens.weight"]
        self.final_norm = dense.tensors["model.norm.weight"].float()
        cos, sin = rotary_table(dense.config, length)
        self.cos, self.sin = cos.to(BF16), sin.to(BF16)

    def attention(self, index: int, x: Tensor, p: dict[str, Tensor] | None) -> Tensor:
        """Return the float32 residual stream `[rows, length, hidden]` after layer `index`'s attention."""
        c, w = self.config, self.layers[index]
        rows, length, _ = x.shape
        h = _norm(x, w.norm1 if p is None else p["norm1"], c.norm_eps)
        qkv = _linear(h, w.qkv, _pair(p, "qkv")).view(rows, length, -1, c.head_dim).transpose(1, 2)
        q, k, v = qkv.split([c.heads, c.kv_heads, c.kv_heads], 1)
        cos, sin = self.cos[:length], self.sin[:length]
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + _linear(mixed.transpose(1, 2).reshape(rows, length, -1), w.o, _pair(p, "o"))

    def layer(
        self, index: int, x: Tensor, p: dict[str, Tensor] | None, tau: float = 0.0
    ) -> tuple[Tensor, Tensor | None]:
        """Run one layer on the float32 residual stream `[rows, length, hidden]`; `p` None means the dense layer.

        Returns the new residual stream and, for the student, the selected ids.
        """
        c, w = self.config, self.layers[index]
        x = self.attention(index, x, p)
        h = _norm(x, w.norm2 if p is None else p["norm2"], c.norm_eps)
        gate, up = _linear(h, w.gate_up, _pair(p, "gate_up")).chunk(2, -1)
        inner = F.silu(gate) * up
        ids = None
        if p is not None:
            s = self.shape
            gate_of, ids = gates(h, p["router"], s, tau)
            always = gate_of.new_ones(*gate_of.shape[:-1], s.shared)
            mask = torch.cat([always, gate_of.repeat_interleave(s.expert_size, -1)], -1)
            inner = inner * (mask * p["scale"]).to(BF16)
        return x + _linear(inner, w.down, _pair(p, "down")), ids

    def forward(
        self, ids: Tensor, params: list[dict[str, Tensor]] | None, tau: float = 0.0, each: Any = None
    ) -> Tensor:
        """Return the last residual stream, float32 `[rows, length, hidden]`, for token `ids` `[rows, length]`.

        `each(layer, x, selected ids)` sees every layer's output.
        """
        x = self.embedding[ids].float()
        for index in range(self.config.layers):
            x, chosen = self.layer(index, x, None if params is None else params[index], tau)
            if each is not None:
                each(index, x, chosen)
        return x

    def head_input(self, x: Tensor) -> Tensor:
        """Apply the final norm; bf16."""
        return _norm(x, self.final_norm, self.config.norm_eps)
