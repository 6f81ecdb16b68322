"""Step 3.7: plain experts; some layers clamp what is between their two matrices."""

from __future__ import annotations

from typing import Any

import torch

from offload.model.families.base import Adapter, StreamedExperts


class Step3p7Experts(StreamedExperts):
    def __init__(self, stock: Any, config: Any) -> None:
        super().__init__(stock.num_experts, stock.act_fn, stock.gate_up_proj, stock.down_proj)
        self.__dict__["_stock_gate"] = stock._apply_gate  # its clamp is the layer's own

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gated: torch.Tensor = self._stock_gate(gate_up)
        return gated


STEP3P7 = Adapter("Step3p7Experts", Step3p7Experts)
