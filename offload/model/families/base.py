"""What stands in a model for an experts module that is not behind transformers' experts interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import PretrainedConfig

from offload.model.transformers_api import default_apply_gate, run_experts


class StreamedExperts(torch.nn.Module):
    """Gated experts that look to the rest of the library like those of a family behind the interface.

    ``gate_up_proj`` [experts, 2 x inner, hidden] and ``down_proj`` [experts, hidden, inner], on the meta device, are
    taken away before weights are loaded. Subclasses say where their family differs.
    """

    has_gate = True
    has_bias = False
    has_post_expert_norm = False
    is_transposed = False
    is_concatenated = True

    transposed: ClassVar[frozenset[str] | None] = None
    """The parameters held as [inputs, outputs], where ``is_transposed`` does not tell."""
    rows_of_one_matrix: ClassVar[bool] = False
    """Whether the checkpoint has the experts one below the other in one matrix."""

    _apply_gate = default_apply_gate

    def __init__(
        self,
        num_experts: int,
        act_fn: Callable[[torch.Tensor], torch.Tensor],
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        routed_to: int | None = None,
    ) -> None:
        """``routed_to``: what the router chooses from, if that is more than the experts."""
        super().__init__()
        self.num_experts = num_experts
        self.act_fn = act_fn
        self.gate_up_proj = torch.nn.Parameter(gate_up_proj, requires_grad=False)
        self.down_proj = torch.nn.Parameter(down_proj, requires_grad=False)
        self.routed_to = num_experts if routed_to is None else routed_to

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As for all experts modules: [T, H], [T, k] and [T, k] -> [T, H]."""
        return run_experts(self, hidden_states, top_k_index, top_k_weights)


class OwnProduct(StreamedExperts):
    """Experts whose stock module multiplies in another way than ``eager`` experts do, which may round differently."""

    def product(
        self, weights: Mapping[str, torch.Tensor], hidden: torch.Tensor, tokens: torch.Tensor | None
    ) -> torch.Tensor:
        """One expert with native weights over ``tokens`` of ``hidden`` [T, H], in their order; None: the only one.

        Returns [len(tokens), H], not weighted by the router.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Adapter:
    """How a family comes behind the interface.

    Every module of the class ``stock`` is replaced by what ``make`` makes of it and the config of its model.
    ``conversions`` are those of the parameters that get other names than in the library: {parameter: patterns of
    checkpoint tensors}.
    """

    stock: str
    make: Callable[[torch.nn.Module, PretrainedConfig], torch.nn.Module]
    conversions: Mapping[str, Sequence[str]] = field(default_factory=dict)
