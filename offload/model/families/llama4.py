"""Llama 4: the router's score weighs what an expert gets, not what it gives, and stock computes all experts.

A token's input for the experts that it did not choose is zero, and so is what they give. So only chosen experts are
computed, each with its tokens' weighted inputs, and the sum is that of the stock block: with one expert for a token,
as all published models have it, there is nothing to add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from offload.errors import ModelError
from offload.model.families.base import Adapter, OwnProduct


class Llama4Experts(OwnProduct):
    """In float32 an expert is computed for all tokens, zeros in the place of those that did not choose it.

    That is what stock does, and float32 products round by how many rows there are. In the dtypes that models are
    published in, they do not, and only the tokens that chose an expert are computed.
    """

    is_transposed = True

    def __init__(self, stock: Any) -> None:
        super().__init__(stock.num_experts, stock.act_fn, stock.gate_up_proj, stock.down_proj)

    def product(
        self, weights: Mapping[str, torch.Tensor], hidden: torch.Tensor, tokens: torch.Tensor | None
    ) -> torch.Tensor:
        if tokens is None:
            return self._product(weights, hidden)
        if hidden.dtype is not torch.float32:
            return self._product(weights, hidden[tokens])
        states = torch.zeros_like(hidden)
        states[tokens] = hidden[tokens]
        return self._product(weights, states)[tokens]

    def _product(self, weights: Mapping[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        states = self._apply_gate(torch.bmm(states[None], weights["gate_up_proj"][None]))
        return torch.bmm(states, weights["down_proj"][None])[0]


class Llama4Block(torch.nn.Module):
    def __init__(self, stock: Any, config: Any) -> None:
        if stock.top_k != 1:
            raise ModelError(
                f"llama4 models with {stock.top_k} experts for a token are not supported; all published ones have 1"
            )
        super().__init__()
        self.router = stock.router
        self.shared_expert = stock.shared_expert
        self.experts = Llama4Experts(stock.experts)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[batch, tokens, H] -> [tokens, H] and the router's logits [tokens, experts], as the stock block."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = self.router(flat)
        expert = torch.topk(logits, 1, dim=1).indices
        score = scores.gather(1, expert)
        output: torch.Tensor = self.shared_expert(flat)
        output.add_(self.experts(flat * score, expert, torch.ones_like(score)))
        return output, logits


LLAMA4 = Adapter("Llama4TextMoe", Llama4Block)
