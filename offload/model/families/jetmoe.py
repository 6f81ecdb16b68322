"""JetMoE: the experts of the MLP stream; those of its attention, a fifth of the weights, stay in the skeleton.

A router decides there which of a layer's query and output projections a token uses: no FFN, and as much needed before
attention as after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from offload.model.families.base import Adapter, OwnProduct


class JetMoeExperts(OwnProduct):
    """An expert's tokens are in ascending order."""

    def __init__(self, stock: Any) -> None:
        up, down = stock.input_linear, stock.output_linear
        super().__init__(up.num_experts, stock.activation, up.weight, down.weight)

    def product(
        self, weights: Mapping[str, torch.Tensor], hidden: torch.Tensor, tokens: torch.Tensor | None
    ) -> torch.Tensor:
        if tokens is None:
            return self._product(weights, hidden)
        ascending, order = tokens.sort()
        products = self._product(weights, hidden[ascending])
        return torch.empty_like(products).index_copy_(0, order, products)

    def _product(self, weights: Mapping[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        states = self._apply_gate(torch.nn.functional.linear(states, weights["gate_up_proj"]))
        return torch.nn.functional.linear(states, weights["down_proj"])


class JetMoeBlock(torch.nn.Module):
    def __init__(self, stock: Any, config: Any) -> None:
        super().__init__()
        self.bias = stock.bias
        self.router = stock.router
        self.experts = JetMoeExperts(stock)

    def forward(self, layer_input: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, H] -> the same."""
        flat = layer_input.reshape(-1, layer_input.shape[-1])
        scores, experts = self.router.layer(flat).float().topk(self.router.top_k, dim=1)
        weights = torch.softmax(scores, dim=1).type_as(flat)
        output: torch.Tensor = self.experts(flat, experts, weights)
        return output.view(layer_input.shape) + self.bias


JETMOE = Adapter(
    "JetMoeMoE",
    JetMoeBlock,
    {
        ".mlp.experts.gate_up_proj": (r"\.mlp\.input_linear\.weight",),
        ".mlp.experts.down_proj": (r"\.mlp\.output_linear\.weight",),
    },
)
