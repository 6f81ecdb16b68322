"""Experts on the pretend GPU: a group of them is launched like a kernel and runs on a thread of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cache.keys import ExpertKey
from offload.checkpoint.formats import Weights
from offload.checkpoint.formats.packed import PackedParameter
from offload.compute.base import EventCompute, ExpertCompute, WeightsOf
from offload.compute.matrix import QuantizedMatrix
from offload.devices.simulated.arena import SimSlotArena
from offload.devices.simulated.streams import SimStream
from offload.devices.simulated.tensor import SimMode, SimTensor, SimulatedError, World


class SimExperts(ExpertCompute):
    """``inner`` computes; here is when, and whether it may."""

    def __init__(self, inner: ExpertCompute, world: World, kernels: SimStream, arena: SimSlotArena) -> None:
        self.inner = inner
        self.world = world
        self.kernels = kernels
        self.arena = arena

    def begin(
        self,
        module: Any,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        weights_of: WeightsOf,
    ) -> EventCompute:
        return _SimEvent(self, module, hidden, top_k_index, top_k_weights, weights_of)


class _SimEvent(EventCompute):
    def __init__(
        self,
        owner: SimExperts,
        module: Any,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        weights_of: WeightsOf,
    ) -> None:
        self._owner = owner
        self._weights_of = weights_of
        self._launched: dict[ExpertKey, Weights] = {}
        self._pairs = top_k_index.numel()
        self._event = owner.inner.begin(module, hidden, top_k_index, top_k_weights, self._launched.__getitem__)
        self.experts = self._event.experts

    @property
    def calls(self) -> int:  # type: ignore[override]
        return self._event.calls

    def compute(self, ready: Sequence[ExpertKey]) -> None:
        owner, moved, numbers = self._owner, 0, 0
        addresses = []
        for key in ready:
            weights = self._launched[key] = self._weights_of(key)
            parts = [part for weight in weights.values() for part in _parts(weight)]
            moved += sum(part.nbytes for part in parts)
            numbers += sum(map(_count, weights.values()))
            addresses += [part.elem.data_ptr() for part in parts if isinstance(part, SimTensor)]
        slots = owner.arena.slots_at(addresses)
        for slot in slots:
            filled = owner.arena.filled.get(slot)
            if filled is None or not owner.kernels.ordered_after(filled):
                raise SimulatedError(f"slot {slot} is read before the fence of its copy was waited for")
        ready = list(ready)

        def kernel() -> None:
            owner.world.quiet.on = True
            with torch.inference_mode(), SimMode(owner.world):
                self._event.compute(ready)

        # 2 operations for every weight and token, of which each expert has as many as the others
        flops = 2.0 * numbers * max(1.0, self._pairs / max(1, len(self.experts)))
        done_at = owner.world.clock.launch(moved, flops, owner.world.clock.machine.event_s)
        fence = owner.kernels.launch(kernel, (), done_at)
        for slot in slots:
            owner.arena.read_by(slot, fence)

    def products(self, expert: int) -> torch.Tensor:
        self._owner.kernels.synchronize()
        return self._event.products(expert)

    def accept(self, expert: int, products: torch.Tensor) -> None:
        owner = self._owner

        def kernel() -> None:
            owner.world.quiet.on = True
            with torch.inference_mode(), SimMode(owner.world):
                self._event.accept(expert, products)

        owner.kernels.launch(kernel, (), owner.world.clock.launch(2 * products.nbytes))

    def result(self) -> torch.Tensor:
        self._owner.kernels.synchronize()
        return self._event.result()


def _parts(weight: torch.Tensor | QuantizedMatrix | PackedParameter) -> list[torch.Tensor]:
    if isinstance(weight, PackedParameter):
        pieces = [[piece] if isinstance(piece, torch.Tensor) else piece.parts for piece in weight.pieces]
        return [part for parts in pieces for part in parts]
    return [weight.codes, weight.params] if isinstance(weight, QuantizedMatrix) else [weight]


def _count(weight: torch.Tensor | QuantizedMatrix | PackedParameter) -> int:
    """How many weights there are."""
    if isinstance(weight, QuantizedMatrix):
        return weight.layout.rows * weight.layout.columns
    return weight.shape[0] * weight.shape[1] if isinstance(weight, PackedParameter) else weight.numel()
