"""DBRX: the experts of a layer are three matrices, each with the experts one below the other, the last transposed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from offload.model.families.base import Adapter, OwnProduct


class DbrxExperts(OwnProduct):
    """``gate_up_proj`` is an expert's part of ``w1`` above that of ``v1``; ``down_proj`` is that of ``w2``."""

    transposed = frozenset({"down_proj"})
    rows_of_one_matrix = True

    def __init__(self, stock: Any, config: Any) -> None:
        experts, inner, hidden = stock.num_experts, stock.ffn_hidden_size, stock.hidden_size
        super().__init__(
            experts,
            stock.mlp.activation_fn,
            stock.mlp.w1.new_empty((experts, 2 * inner, hidden)),
            stock.mlp.w2.new_empty((experts, inner, hidden)),
        )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """``hidden_states`` is [batch, tokens, H]."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return super().forward(flat, top_k_index, top_k_weights).view(hidden_states.shape)

    def product(
        self, weights: Mapping[str, torch.Tensor], hidden: torch.Tensor, tokens: torch.Tensor | None
    ) -> torch.Tensor:
        """As three products."""
        states = hidden if tokens is None else hidden[tokens]
        gate, up = weights["gate_up_proj"].chunk(2)
        return (self.act_fn(states @ gate.t()) * (states @ up.t())) @ weights["down_proj"]


DBRX = Adapter(
    "DbrxExperts",
    DbrxExperts,
    {
        "ffn.experts.gate_up_proj": ("ffn.experts.mlp.w1", "ffn.experts.mlp.v1"),
        "ffn.experts.down_proj": (r"ffn\.experts\.mlp\.w2",),
    },
)
