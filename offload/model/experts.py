"""The experts function: runs one event of routed experts out of the expert cache.

Bit for bit the same as transformers' ``eager`` experts, whatever is resident: each expert's product is computed on its
own, over its tokens in ``eager``'s order, and the products are summed in ascending order of expert, whenever they
were computed.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

from cache.expert_cache import ExpertCache, SlotState
from cache.keys import ExpertKey
from cache.trace import DECODE, PREFILL, TraceRecorder
from offload.checkpoint.expert_file import ExpertFile
from offload.checkpoint.formats import WeightFormat
from offload.devices import SlotArena
from offload.errors import Cancelled
from offload.memory.lanes import DiskLane, Ticket
from offload.model.families import sum_dtype
from offload.model.transformers_api import ExpertsModule, register_experts_function


@dataclass(slots=True)
class ForwardPass:
    """What the engine is doing while the experts run: for the trace and for counting prefill and decode apart.

    ``step`` is the position in the request of the pass's first token.
    """

    request: int = 0
    step: int = 0
    forward: int = 0
    decode: bool = False


@dataclass(slots=True)
class TransferCounters:
    """Sums since the start: bytes read from disk, and the seconds that compute waited for them."""

    prefill_bytes: int = 0
    decode_bytes: int = 0
    stall_seconds: float = 0.0


class ExpertRuntime:
    """Owns the way from a routing decision to the sum of the experts' products. Runs on the engine thread only."""

    def __init__(
        self,
        cache: ExpertCache,
        arena: SlotArena,
        lane: DiskLane,
        file: ExpertFile,
        weight_format: WeightFormat,
        recorder: TraceRecorder | None = None,
    ) -> None:
        self.cache = cache
        self.current = ForwardPass()
        self.transfers = TransferCounters()
        self.cancelled = threading.Event()
        self._arena = arena
        self._lane = lane
        self._file = file
        self._format = weight_format
        self._recorder = recorder
        self._tickets: dict[ExpertKey, Ticket] = {}
        self._views: dict[tuple[int, int], dict[str, torch.Tensor]] = {}  # (slot, record layout) -> weights

    def attach(self, modules: list[ExpertsModule]) -> None:
        """Serve these experts modules. Changes the modules: each remembers this runtime and its layer."""
        register_experts_function(_experts_function)
        for found in modules:
            found.module.__dict__["run_local"] = (self, found.layer)

    def run(
        self, module: Any, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """One event. ``hidden`` is [T, H], ``top_k_index`` and ``top_k_weights`` are [T, k]; returns [T, H].

        Ids at or beyond the number of experts mean "no expert". Raises Cancelled, or the error of a failed load; the
        cache is consistent afterwards, and loads that had started are finished.
        """
        if self.cancelled.is_set():
            raise Cancelled
        if self._recorder is not None:
            self._record(layer, top_k_index, top_k_weights)
        rows = _rows_by_expert(top_k_index, module.num_experts)
        found = self.cache.lookup(layer, rows, decode=self.current.decode)
        products: dict[int, torch.Tensor] = {}

        def compute(key: ExpertKey) -> None:
            tokens, positions = rows[key.expert]
            states = hidden if tokens is None else hidden[tokens]
            weights = top_k_weights[:, positions] if tokens is None else top_k_weights[tokens, positions, None]
            products[key.expert] = _expert_product(module, self._weights(key), states) * weights
            self.cache.release(key)

        misses = list(found.misses)
        loading = [*found.pending]
        try:
            loading += self._start_loads(misses)  # before the hits compute, so that both happen at once
            for key in found.hits:
                compute(key)
                if misses:  # this key's slot may be the one that a miss waits for
                    loading += self._start_loads(misses)
            while loading:
                if self.cancelled.is_set():
                    raise Cancelled
                key = next((key for key in loading if self._tickets[key].ready()), loading[0])
                loading.remove(key)
                self._finish_load(key)
                compute(key)
                if misses:
                    loading += self._start_loads(misses)
        finally:
            for key in loading:  # only after an error or a cancel
                self._settle(key)
            self.cache.end_event()
        return _combine(hidden, rows, products, sum_dtype(module, hidden, top_k_weights))

    def close(self) -> None:
        """Finish or drop all loads in flight."""
        for key in list(self._tickets):
            self._settle(key)
        self._views.clear()

    def _start_loads(self, misses: list[ExpertKey]) -> list[ExpertKey]:
        """Start as many of ``misses`` as slots can be had for, and take them off the queue."""
        reserved = self.cache.reserve(misses)
        for number, (key, slot, _) in enumerate(reserved):
            misses.remove(key)
            try:
                self._tickets[key] = self._lane.load(key, self._arena.buffer(slot))
            except BaseException:  # no thread to be had: what has no ticket must not stay loading
                for load in reserved[number:]:
                    self.cache.abandon(load.key)
                raise
        return [load.key for load in reserved]

    def _finish_load(self, key: ExpertKey) -> None:
        ticket = self._tickets.pop(key)
        try:
            size, stalled = ticket.wait()
        except BaseException:
            ticket.settle()
            self.cache.abandon(key)
            raise
        self.cache.commit(key)
        self.transfers.stall_seconds += stalled
        if self.current.decode:
            self.transfers.decode_bytes += size
        else:
            self.transfers.prefill_bytes += size

    def _settle(self, key: ExpertKey) -> None:
        """Wait until nothing writes to the key's slot, then keep or give up the slot. Raises nothing."""
        if self._tickets.pop(key).settle():
            self.cache.commit(key)
        else:
            self.cache.abandon(key)

    def _weights(self, key: ExpertKey) -> dict[str, torch.Tensor]:
        assert self.cache.state(key) is SlotState.READY
        slot = self.cache.slot(key)
        layout = self._file.layout(key.layer)
        views = self._views.get((slot, id(layout)))
        if views is None:
            views = self._views[slot, id(layout)] = self._format.views(layout, self._arena.tensor(slot))
        return views

    def _record(self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> None:
        assert self._recorder is not None
        now = self.current
        self._recorder.record(
            request=now.request,
            phase=DECODE if now.decode else PREFILL,
            step=now.step,
            forward=now.forward,
            layer=layer,
            ids=top_k_index.to("cpu", torch.int16, copy=True).numpy(),
            weights=top_k_weights.to("cpu", torch.float16, copy=True).numpy(),
        )


def _experts_function(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls; holds no state: the runtime hangs on the module."""
    if hidden_states.is_meta:  # shapes are being worked out for the memory plan
        return torch.zeros_like(hidden_states)
    runtime, layer = module.__dict__["run_local"]
    return runtime.run(module, layer, hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]


register_experts_function(_experts_function)

Rows = dict[int, tuple[torch.Tensor | None, Any]]
"""Of each selected expert, in ascending order: its tokens and, for each, the position among the token's top k.
Tokens None stands for "the only token" and goes with a slice of one position."""


def _rows_by_expert(top_k_index: torch.Tensor, num_experts: int) -> Rows:
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


def _expert_product(module: Any, weights: dict[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
    """One expert over its tokens [n, H] -> [n, H], not yet weighted by the router."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    states = _linear(module, states, weights[name], weights.get(f"{name}_bias"))
    states = module._apply_gate(states) if module.has_gate else module.act_fn(states)
    states = _linear(module, states, weights["down_proj"], weights.get("down_proj_bias"))
    return module.post_expert_norm(states) if module.has_post_expert_norm else states


def _linear(module: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if module.is_transposed:
        product = states @ weight
        return product if bias is None else product + bias
    return torch.nn.functional.linear(states, weight, bias)


def _combine(hidden: torch.Tensor, rows: Rows, products: dict[int, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The sum of the products in ascending order of expert, summed in ``dtype``; [T, H] in the dtype of ``hidden``."""
    total = torch.zeros_like(hidden, dtype=dtype)
    for expert, (tokens, _) in rows.items():
        product = products[expert].view(-1, hidden.shape[-1]).to(dtype)
        if tokens is None:
            total += product
        else:
            total.index_add_(0, tokens, product)
    return total.to(hidden.dtype)
