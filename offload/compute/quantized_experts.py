"""Experts with quantised weights: all that are ready in one call, with few tokens; one after the other with many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch

from cache.keys import ExpertKey
from offload.checkpoint.formats import Weights
from offload.compute.base import EventCompute, ExpertCompute, RowEvent, WeightsOf
from offload.compute.kernels.binding import Expert
from offload.compute.matrix import QuantizedMatrix
from offload.compute.product import Products, panel_bytes, wide_rows

CALL_ROWS = 256
"""Pairs of a token and an expert that one call of the kernel takes, if no single expert has more."""

_FEW_PAIRS = 512
"""Pairs that are sorted here. torch does the same in three operations, which take a millisecond beside busy readers."""

GatesWithSilu = Callable[[Any], bool]
KernelJob = tuple[int, int, int, int]
"""Addresses of a record and (here 0) of params, the first row of the input, and how many."""


class QuantizedExperts(ExpertCompute):
    """``gates_with_silu`` tells of an experts module whether its inner step is ``silu(gate) * up``: the kernel can do
    that itself. Other modules compute it in the model's own code, between two calls of the kernel.
    """

    def __init__(self, products: Products, gates_with_silu: GatesWithSilu) -> None:
        self.products = products
        self._gates_with_silu = gates_with_silu
        self._fused: dict[Any, bool] = {}  # by experts module
        self._experts: dict[tuple[Any, ...], Expert] = {}
        self._rows = torch.empty(0)

    def begin(
        self,
        module: Any,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        weights_of: WeightsOf,
    ) -> EventCompute:
        return _QuantizedEvent(self, module, hidden, top_k_index, top_k_weights, weights_of)

    def few_tokens(self, weights: Weights) -> int:
        return self.products.few_tokens(*(w.layout for w in weights.values() if isinstance(w, QuantizedMatrix)))

    def is_fused(self, module: Any) -> bool:
        found = self._fused.get(module)
        if found is None:
            plain = module.has_gate and not (module.has_bias or module.has_post_expert_norm)
            found = self._fused[module] = bool(plain and self._gates_with_silu(module))
        return found

    def rows(self, count: int, hidden: torch.Tensor) -> torch.Tensor:
        """Room for ``count`` products, float32[count, width of ``hidden``], which the next event takes again: that the
        system clears fresh memory took 6 % of a chunk of 512 tokens.
        """
        width = hidden.shape[-1]
        if self._rows.numel() < count * width or self._rows.device != hidden.device:
            self._rows = torch.empty(0)  # before there is more
            self._rows = torch.empty(count * width, device=hidden.device)
        return self._rows[: count * width].view(count, width)

    def expert(self, gate_up: QuantizedMatrix, down: QuantizedMatrix) -> tuple[Expert, int]:
        """Where the matrices stand, from the first byte of the record on, and that byte's address.

        gate_up may come after down in the record: the lowest address is the base.
        """
        addresses = [part.data_ptr() for part in (gate_up.codes, gate_up.params, down.codes, down.params)]
        base = min(addresses)
        offsets = tuple(address - base for address in addresses)
        key = (gate_up.layout, down.layout, offsets)
        expert = self._experts.get(key)
        if expert is None:
            expert = self._experts[key] = Expert(gate_up.layout.shape, down.layout.shape, *offsets)
        return expert, base


class _QuantizedEvent(RowEvent):
    """Rows are pairs of a token and one of its experts; ``products`` holds one product for each, float32.

    With one token a row's number is the position in its top k; otherwise rows are sorted by expert. Either order, in
    which the products are summed in the end, follows from the routing alone.
    """

    def __init__(
        self,
        owner: QuantizedExperts,
        module: Any,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        weights_of: WeightsOf,
    ) -> None:
        self.calls = 0
        self._owner = owner
        self._module = module
        self._hidden = hidden.contiguous()
        self._weights_of = weights_of
        tokens, k = top_k_index.shape
        chosen = top_k_index[0].tolist() if tokens == 1 else []
        if tokens == 1 and len(set(chosen)) == k and max(chosen) < module.num_experts:
            self._rows = {expert: (row, 1) for row, expert in enumerate(chosen)}
            self._token_of = torch.zeros(k, dtype=torch.int32, device=hidden.device)
            routed = top_k_weights[0]
        else:
            flat = top_k_index.reshape(-1)
            weights = top_k_weights.reshape(-1)
            if len(flat) <= _FEW_PAIRS and flat.device.type == "cpu":
                order, counted = _sort_few(flat.tolist())
            else:
                order = torch.argsort(flat, stable=True)
                found, counts = torch.unique_consecutive(flat[order], return_counts=True)
                counted = zip(found.tolist(), counts.tolist(), strict=True)
            self._rows = {}
            first = 0
            for expert, count in counted:
                if expert < module.num_experts:  # those beyond come last
                    self._rows[expert] = (first, count)
                    first += count
            order = order[:first]
            self._token_of = (order // k).to(torch.int32)
            routed = weights[order]
        self._routed = routed.to(torch.float32).contiguous()
        self._products = owner.rows(len(self._token_of), hidden)
        self.experts = sorted(self._rows)

    def compute(self, ready: Sequence[ExpertKey]) -> None:
        together: list[tuple[Weights, int, int]] = []
        many: list[tuple[Weights, int, int]] = []
        fused = self._owner.is_fused(self._module)
        for key in ready:
            first, count = self._rows[key.expert]
            weights = self._weights_of(key)
            if count <= self._owner.products.always_few or count <= self._owner.few_tokens(weights):
                together.append((weights, first, count))
            elif fused and self._owner.products.takes_wide(self._hidden.dtype):
                many.append((weights, first, count))
            else:
                self._one(weights, first, count)
        self._wide(many)
        step = self._fused if fused else self._steps
        while together:  # a call has few rows, since the kernel holds a copy of the input of each
            rows = taken = 0
            while taken < len(together) and (not taken or rows + together[taken][2] <= CALL_ROWS):
                rows += together[taken][2]
                taken += 1
            step(together[:taken])
            del together[:taken]

    def result(self) -> torch.Tensor:
        kernels = self._owner.products.kernels
        hidden = self._hidden
        if kernels is not None and hidden.dtype in (torch.float32, torch.bfloat16):
            output = kernels.states.empty(hidden.shape, hidden.dtype)
            kernels.combine(self._products, self._routed, self._token_of, output)
            return output
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        weighted = self._products * self._routed[:, None]
        if hidden.device.type == "cpu":
            total.index_add_(0, self._token_of, weighted)  # in the order of the rows
        else:
            add_in_order(total, self._token_of, weighted, self._rows.values())
        return total.to(hidden.dtype)

    def _states(self) -> torch.Tensor:
        """The input in a dtype that the kernels take."""
        return self._hidden if self._hidden.dtype in (torch.float32, torch.bfloat16) else self._hidden.float()

    def _fused(self, together: list[tuple[Weights, int, int]]) -> None:
        kernels = self._owner.products.kernels
        assert kernels is not None
        for expert, jobs in self._jobs(together):
            kernels.silu_experts(expert, jobs, self._states(), self._products, self._token_of)
            self.calls += 1

    def _wide(self, many: list[tuple[Weights, int, int]]) -> None:
        """Experts with many tokens each, in calls whose copies of the input stay small."""
        kernels = self._owner.products.kernels
        if not many:
            return
        gate_up, down = (matrix.layout for matrix in _matrices(many[0][0]))
        rows = wide_rows(panel_bytes(gate_up) + panel_bytes(down) + 4 * down.columns)
        for expert, jobs in self._jobs(many):
            assert kernels is not None
            for call in in_calls(jobs, rows):
                kernels.wide_experts(expert, call, self._hidden, self._products, self._token_of)
                self.calls += 1

    def _jobs(self, some: list[tuple[Weights, int, int]]) -> list[tuple[Expert, list[KernelJob]]]:
        """The kernel's jobs, by layout: one, since the experts of a layer are laid out alike."""
        jobs_of: dict[int, tuple[Expert, list[KernelJob]]] = {}
        for weights, first, count in some:
            expert, base = self._owner.expert(*_matrices(weights))
            jobs_of.setdefault(id(expert), (expert, []))[1].append((base, 0, first, count))
        return list(jobs_of.values())

    def _steps(self, together: list[tuple[Weights, int, int]]) -> None:
        """As :meth:`_fused`, with the module's own code between the matrices."""
        module = self._module
        name = "gate_up_proj" if module.has_gate else "up_proj"
        states = self._states()
        tokens = torch.cat([self._token_of[first : first + count] for _, first, count in together])
        outer = self._grouped(name, together, states, tokens)
        parts = []
        for (weights, _, _), part in zip(together, outer.split([count for _, _, count in together]), strict=True):
            part = _plus(part, weights.get(f"{name}_bias")).to(self._hidden.dtype)
            parts.append(module._apply_gate(part) if module.has_gate else module.act_fn(part))
        done = self._grouped("down_proj", together, torch.cat(parts).to(states.dtype), None)
        for (weights, first, count), part in zip(together, done.split([len(part) for part in parts]), strict=True):
            self._products[first : first + count] = part
            self._finish(weights.get("down_proj_bias"), slice(first, first + count))

    def _grouped(
        self, name: str, together: list[tuple[Weights, int, int]], inputs: torch.Tensor, token_of: torch.Tensor | None
    ) -> torch.Tensor:
        """Products of these experts' matrices ``name``, float32[their rows, outputs], expert after expert."""
        matrices = [cast(QuantizedMatrix, weights[name]) for weights, _, _ in together]
        jobs = []
        rows = 0
        for matrix, (_, _, count) in zip(matrices, together, strict=True):
            jobs.append((matrix.codes.data_ptr(), matrix.params.data_ptr(), rows, count))
            rows += count
        output = torch.empty(rows, matrices[0].layout.rows)
        kernels = self._owner.products.kernels
        assert kernels is not None
        kernels.linear(matrices[0].layout.shape, jobs, inputs, output, token_of)
        self.calls += 1
        return output

    def _one(self, weights: Weights, first: int, count: int) -> None:
        """One expert over many tokens, with the module's own code between the matrices."""
        module, products = self._module, self._owner.products
        rows = slice(first, first + count)
        states = self._hidden[self._token_of[rows]]
        name = "gate_up_proj" if module.has_gate else "up_proj"
        states = products.many_linear(cast(QuantizedMatrix, weights[name]), states)
        states = _plus(states, weights.get(f"{name}_bias"))
        states = module._apply_gate(states) if module.has_gate else module.act_fn(states)
        states = products.many_linear(cast(QuantizedMatrix, weights["down_proj"]), states)
        self.calls += 2
        self._products[rows] = states.float()
        self._finish(weights.get("down_proj_bias"), rows)

    def _finish(self, bias: Any, rows: slice) -> None:
        if bias is not None:
            self._products[rows] += bias
        if self._module.has_post_expert_norm:
            normed = self._module.post_expert_norm(self._products[rows].to(self._hidden.dtype))
            self._products[rows] = normed.float()


def add_in_order(
    total: torch.Tensor, token_of: torch.Tensor, rows: torch.Tensor, parts: Iterable[tuple[int, int]]
) -> None:
    """``total`` [T, H] += ``rows`` [R, H], each to its token, one expert after the other: the bits of the CPU's
    ``index_add_``. A card adds a token's rows there in any order, so that the same event gave other bits each time;
    within one expert's rows, first row and count in ``parts``, a token comes once.
    """
    for first, count in parts:
        total.index_add_(0, token_of[first : first + count], rows[first : first + count])


def in_calls(jobs: Sequence[KernelJob], most: int) -> Iterator[list[KernelJob]]:
    """The same rows in lists of jobs with at most ``most`` rows each; a job is cut where a list is full."""
    call: list[KernelJob] = []
    room = most
    for base, params, first, count in jobs:
        end = first + count
        while first < end:
            taken = min(end - first, room)
            call.append((base, params, first, taken))
            first, room = first + taken, room - taken
            if not room:
                yield call
                call, room = [], most
    if call:
        yield call


def _sort_few(chosen: list[int]) -> tuple[torch.Tensor, Iterable[tuple[int, int]]]:
    """The places of ``chosen``, ascending by what stands there, equals in their order; each with its count."""
    order = sorted(range(len(chosen)), key=chosen.__getitem__)
    return torch.tensor(order, dtype=torch.int64), sorted(Counter(chosen).items())


def _matrices(weights: Weights) -> tuple[QuantizedMatrix, QuantizedMatrix]:
    """Those of a gated expert: gate and up together, and down."""
    return cast(QuantizedMatrix, weights["gate_up_proj"]), cast(QuantizedMatrix, weights["down_proj"])


def _plus(states: torch.Tensor, bias: Any) -> torch.Tensor:
    return states if bias is None else states + bias
