"""All experts of an event that are ready at once: one launch for each of their two products.

What stands between the products (gates, norms) is the module's own code, over the rows of all of these experts.
Products are staged and summed in ascending order of expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cache.keys import ExpertKey
from offload.checkpoint.formats import Weights
from offload.compute.base import EventCompute, ExpertCompute, RowEvent, WeightsOf
from offload.compute.grouped import GroupedKernels
from offload.compute.grouped.launches import Placed, Tile, combination, cut, first_address, place, product, row_tile
from offload.model.families import sum_dtype
from offload.model.transformers_api import transposed_names

CALL_ROWS = 256
"""Pairs of a token and an expert that one call takes at least; at most it takes as many as there are tokens, which is
what the plan counts for an expert that all of them chose."""


class GroupedExperts(ExpertCompute):
    """``native``: the weights are in the model's dtype, and products are rounded as ``eager`` rounds them. Otherwise
    they stay in float32 until they are summed, as in ``quantized_experts.py``.

    A single token is multiplied in float32, several on tensor cores.
    """

    def __init__(self, kernels: GroupedKernels, native: bool) -> None:
        self.kernels = kernels
        self.native = native

    def begin(
        self,
        module: Any,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        weights_of: WeightsOf,
    ) -> EventCompute:
        return _GroupedEvent(self, module, hidden, top_k_index, top_k_weights, weights_of)


class _GroupedEvent(RowEvent):
    """Rows are pairs of a token and one of its experts, sorted by expert; ``_products`` holds one product for each."""

    def __init__(
        self,
        owner: GroupedExperts,
        module: Any,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        weights_of: WeightsOf,
    ) -> None:
        self.calls = 0
        self._kernels = owner.kernels
        self._native = owner.native
        self._module = module
        self._hidden = hidden.contiguous()
        self._top_k_weights = top_k_weights.contiguous()
        self._weights_of = weights_of
        tokens, k = top_k_index.shape
        # an expert's rows stand as in the other computes of the format, which may do a part of the event
        flat = (top_k_index.t() if owner.native else top_k_index).to("cpu").reshape(-1)
        order = torch.argsort(flat, stable=True)
        experts, counts = torch.unique_consecutive(flat[order], return_counts=True)
        self._rows: dict[int, tuple[int, int]] = {}  # of each expert: its first row, and how many
        rows = 0
        for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
            if expert < module.num_experts:  # those beyond come last
                self._rows[expert] = (rows, count)
                rows += count
        self.experts = list(self._rows)
        order = order[:rows]
        self._token, self._choice = (order % tokens, order // tokens) if owner.native else (order // k, order % k)
        self._size: int | None = None
        self._token_of: torch.Tensor | None = None
        if tokens > 1:
            self._size = row_tile(rows, len(self.experts))
            self._token_of = self._kernels.upload(self._token.to(torch.int32))
        dtype = hidden.dtype if owner.native else torch.float32
        self._products = torch.empty(rows, hidden.shape[-1], dtype=dtype, device=hidden.device)

    def compute(self, ready: Sequence[ExpertKey]) -> None:
        most = max(CALL_ROWS, len(self._hidden))
        together: list[ExpertKey] = []
        rows = 0
        for key in ready:
            count = self._rows[key.expert][1]
            if together and rows + count > most:
                self._call(together, rows)
                together, rows = [], 0
            together.append(key)
            rows += count
        if together:
            self._call(together, rows)

    def result(self) -> torch.Tensor:
        products = self._products
        routed, weighted, sums = self._top_k_weights, torch.float32, torch.float32
        if self._native:
            weighted = torch.result_type(products, routed)
            sums = sum_dtype(self._module, self._hidden, routed)
        output = torch.empty_like(self._hidden)
        row_of = self._kernels.upload(summands(self._token, self._choice, *routed.shape))
        self._kernels.run(combination(products, routed, row_of, output, weighted, sums))
        return output

    def _call(self, together: Sequence[ExpertKey], rows: int) -> None:
        module, hidden = self._module, self._hidden
        names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
        outer, inner, tiles = self._tiles(together, names)
        states = hidden.new_empty(rows, outer.rows)
        run, size = self._kernels.run, self._size
        run(product(outer, tiles, hidden, states, inner=False, size=size, token_of=self._token_of))
        states = module._apply_gate(states) if module.has_gate else module.act_fn(states)
        run(product(inner, tiles, states.contiguous(), self._products, inner=True, size=size))
        self.calls += 2
        if module.has_post_expert_norm:
            for key in together:
                products = self.products(key.expert)
                products.copy_(module.post_expert_norm(products.to(hidden.dtype)))

    def _tiles(self, together: Sequence[ExpertKey], names: Sequence[str]) -> tuple[Placed, Placed, torch.Tensor]:
        """Where the matrices stand in each of these experts' records, and what a launch is to do."""
        tiles: list[Tile] = []
        placed: list[Placed] = []
        anchor, local = "", 0
        for key in together:
            weights: Weights = self._weights_of(key)
            if not placed:  # the experts of a layer are laid out alike
                placed, anchor = place(weights, names, transposed_names(self._module, names))
            record = first_address(weights[anchor])
            first, count = self._rows[key.expert]
            tiles += cut(record, first, local, count, self._size)
            local += count
        return placed[0], placed[1], self._kernels.upload(torch.tensor(tiles))


def summands(token: torch.Tensor, choice: torch.Tensor, tokens: int, k: int) -> torch.Tensor:
    """Of each token, in ascending order of expert: which of its k choices it is, and the row of its product, -1 where
    there are fewer than k. int32[tokens, k, 2].

    ``token`` and ``choice`` int64[rows] are those of each row.
    """
    token, row = torch.sort(token, stable=True)
    count = torch.bincount(token, minlength=tokens)
    place = torch.arange(len(row)) - (count.cumsum(0) - count)[token]
    table = torch.tensor([0, -1], dtype=torch.int32).repeat(tokens, k, 1)
    table[token, place] = torch.stack([choice[row], row], 1).to(torch.int32)
    return table
