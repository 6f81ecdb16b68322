"""LongCat Flash: routers choose from experts and from "zero experts", which give their input back.

The latter have no weights. Their numbers come after the experts', so the experts function takes them for "no expert",
and what they give is added here, in the order in which the stock module adds it.
"""

from __future__ import annotations

from typing import Any

import torch

from offload.model.families.base import Adapter, StreamedExperts


class LongcatFlashExperts(StreamedExperts):
    def __init__(self, stock: Any, config: Any) -> None:
        experts = stock.num_routed_experts
        # the stock parameter has rows for zero experts, which no checkpoint has
        super().__init__(
            experts, stock.act_fn, stock.gate_up_proj[:experts], stock.down_proj, routed_to=stock.total_experts
        )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        total = super().forward(hidden_states, top_k_index, top_k_weights)
        chosen, order = top_k_index.sort(dim=-1)
        weights = top_k_weights.gather(-1, order)
        for position in range(chosen.shape[-1]):
            column = slice(position, position + 1)
            same = (hidden_states * weights[:, column]).to(total.dtype)
            total = torch.where(chosen[:, column] >= self.num_experts, total + same, total)
        return total


LONGCAT_FLASH = Adapter("LongcatFlashExperts", LongcatFlashExperts)
