"""Experts with the checkpoint's own numbers: bit for bit what transformers' ``eager`` experts give.

Packed weights are decoded, one parameter at a time, and give what eager gives with the decoded weights. With few tokens
and compiled kernels they are multiplied as they are, which adds in another order.

Each expert's product is computed on its own, over its tokens in ``eager``'s order, and the products are summed in
ascending order of expert, whenever they were computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cache.keys import ExpertKey
from offload.compute.base import EventCompute, ExpertCompute, WeightsOf
from offload.compute.decoded import DecodedWeights, Decoder
from offload.compute.kernels.published import PublishedKernels
from offload.model.families import sum_dtype
from offload.model.families.base import OwnProduct

Rows = dict[int, tuple[torch.Tensor | None, Any]]
"""Of each selected expert, in ascending order: its tokens and, for each, the position among the token's top k.
Tokens None stands for "the only token" and goes with a slice of one position."""


class NativeExperts(ExpertCompute):
    def __init__(self, published: PublishedKernels | None = None) -> None:
        self._decoder = Decoder(published)

    def begin(
        self,
        module: Any,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        weights_of: WeightsOf,
    ) -> EventCompute:
        return _NativeEvent(self._decoder, module, hidden, top_k_index, top_k_weights, weights_of)


class _NativeEvent(EventCompute):
    def __init__(
        self,
        decoder: Decoder,
        module: Any,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        weights_of: WeightsOf,
    ) -> None:
        self.calls = 0
        self._decoder = decoder
        self._module = module
        self._hidden = hidden
        self._top_k_weights = top_k_weights
        self._weights_of = weights_of
        self._rows = rows_by_expert(top_k_index, module.num_experts)
        self._products: dict[int, torch.Tensor] = {}
        self.experts = list(self._rows)

    def compute(self, ready: Sequence[ExpertKey]) -> None:
        for key in ready:
            tokens, _ = self._rows[key.expert]
            expert = self._decoder.weights(self._weights_of(key), self._hidden.dtype)
            self.accept(key.expert, self._product(expert, tokens))
            self.calls += 2

    def products(self, expert: int) -> torch.Tensor:
        return self._products[expert]

    def accept(self, expert: int, products: torch.Tensor) -> None:
        tokens, positions = self._rows[expert]
        routed = self._top_k_weights
        weights = routed[:, positions] if tokens is None else routed[tokens, positions, None]
        self._products[expert] = products * weights

    def _product(self, weights: DecodedWeights, tokens: torch.Tensor | None) -> torch.Tensor:
        if isinstance(self._module, OwnProduct):
            return self._module.product(weights, self._hidden, tokens)
        states = self._hidden if tokens is None else self._hidden[tokens]
        return expert_product(self._module, weights, states)

    def result(self) -> torch.Tensor:
        dtype = sum_dtype(self._module, self._hidden, self._top_k_weights)
        total = torch.zeros_like(self._hidden, dtype=dtype)
        for expert, (tokens, _) in self._rows.items():
            product = self._products[expert].view(-1, self._hidden.shape[-1]).to(dtype)
            if tokens is None:
                total += product
            else:
                total.index_add_(0, tokens, product)
        return total.to(self._hidden.dtype)


def rows_by_expert(top_k_index: torch.Tensor, num_experts: int) -> Rows:
    """Sort the tokens of an event by expert; within an expert by position, then token, as ``eager`` does."""
    tokens, k = top_k_index.shape
    if tokens == 1:
        chosen = top_k_index[0].tolist()
        if len(set(chosen)) == len(chosen):
            return {
                e: (None, slice(i, i + 1)) for e, i in sorted(zip(chosen, range(k), strict=True)) if e < num_experts
            }
    flat = top_k_index.t().reshape(-1)
    order = torch.argsort(flat, stable=True)
    experts, counts = torch.unique_consecutive(flat[order], return_counts=True)
    rows: Rows = {}
    for expert, part in zip(experts.tolist(), order.split(counts.tolist()), strict=True):
        if expert < num_experts:
            rows[expert] = (part % tokens, part // tokens)
    return rows


def expert_product(module: Any, weights: DecodedWeights, states: torch.Tensor) -> torch.Tensor:
    """One expert over its tokens [n, H] -> [n, H], not yet weighted by the router."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    states = _linear(module, states, weights, name)
    states = module._apply_gate(states) if module.has_gate else module.act_fn(states)
    states = _linear(module, states, weights, "down_proj")
    return module.post_expert_norm(states) if module.has_post_expert_norm else states  # type: ignore[no-any-return]


def _linear(module: Any, states: torch.Tensor, weights: DecodedWeights, name: str) -> torch.Tensor:
    bias = weights.get(f"{name}_bias")
    product = weights.product(name, states, module.is_transposed)
    if product is None and not module.is_transposed:
        return torch.nn.functional.linear(states, weights[name], bias)
    if product is None:
        product = states @ weights[name]
    return product if bias is None else product + bias
