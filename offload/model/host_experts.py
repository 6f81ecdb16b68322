"""Misses computed on the CPU from host memory, while the device computes hits and copies go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from cache.expert_cache import Lookup
from cache.keys import ExpertKey
from cache.misses import ExpertWork, MissPlanner
from offload.checkpoint.expert_file import ExpertFile
from offload.checkpoint.formats import WeightFormat, Weights
from offload.compute.base import EventCompute, ExpertCompute
from offload.devices.base import Passage
from offload.memory.loads import Loads


@dataclass(frozen=True, slots=True)
class HostExperts:
    """What computing on the CPU takes beside a device with tiers. For the engine thread.

    ``compute`` is that of the CPU for the format. ``modules`` are the experts modules by layer, in host memory: what
    little they hold beside the experts' weights, such as a norm, is copied. ``work`` is that of one expert, by layer.
    """

    planner: MissPlanner
    passage: Passage
    compute: ExpertCompute
    modules: Mapping[int, Any]
    work: Mapping[int, ExpertWork]
    loads: Loads
    file: ExpertFile
    format: WeightFormat

    def begin(self, layer: int, hidden: torch.Tensor, chosen: list[list[int]], found: Lookup) -> HostEvent | None:
        """What of the event's misses the CPU computes, its inputs on their way; None if nothing.

        ``hidden`` is [T, H] on the device, ``chosen`` the T lists of experts that the router chose. What is begun must
        be closed. The records are pinned from here on, so that no load that starts now takes their place.
        """
        here = [key for key in found.misses if self.loads.lies_in_ram(key)]
        if not here or self.planner.strategy == "fetch":
            return None
        keys = self.planner.on_cpu(
            here,
            Counter(chain.from_iterable(chosen)),
            self.work[layer],
            hits=found.hits,
            loading=len(found.pending) + len(found.misses) - len(here),
            event_tokens=len(chosen),
        )
        return HostEvent(self, layer, hidden, chosen, keys) if keys else None

    def repays(self, key: ExpertKey, victim: ExpertKey) -> bool:
        """See :meth:`MissPlanner.repays`."""
        return self.planner.repays(self.work[key.layer], key, victim)


class HostEvent:
    """The CPU's part of one event. ``left`` are its experts that were not computed yet, in ascending order."""

    def __init__(
        self, owner: HostExperts, layer: int, hidden: torch.Tensor, chosen: list[list[int]], keys: Sequence[ExpertKey]
    ) -> None:
        self.keys = list(keys)
        self.left = sorted(keys)
        self._owner = owner
        self._layer = layer
        self._chosen = chosen
        self._dtype = hidden.dtype
        self._event: EventCompute | None = None
        self._lent: dict[ExpertKey, torch.Tensor] = {}
        self._take_inputs = owner.passage.down(hidden)
        try:
            for key in self.keys:
                self._lent[key] = owner.loads.lend(key)
        except BaseException:
            self.close()
            raise

    @property
    def calls(self) -> int:
        """See :attr:`EventCompute.calls`."""
        return 0 if self._event is None else self._event.calls

    def compute(self, into: EventCompute, keys: Sequence[ExpertKey]) -> None:
        """Compute ``keys`` and give their products to the device's event."""
        owner = self._owner
        event = self._begun()
        event.compute(keys)
        tokens = Counter(chain.from_iterable(self._chosen))
        work = owner.work[self._layer]
        for key in keys:
            owner.passage.computed(work.record_bytes, tokens[key.expert] * work.flops)
            self.left.remove(key)
        products = [event.products(key.expert) for key in keys]
        moved = owner.passage.up(torch.cat(products))
        for key, part in zip(keys, moved.split([len(part) for part in products]), strict=True):
            into.accept(key.expert, part)

    def close(self) -> None:
        """Give the records back, whether they were computed or not."""
        for key in self._lent:
            self._owner.loads.give_back(key)
        self._lent.clear()

    def _begun(self) -> EventCompute:
        """The event on the CPU: with these experts alone, each weighted by 1, since the device weights products."""
        if self._event is None:
            owner, module = self._owner, self._owner.modules[self._layer]
            mine = {key.expert for key in self.keys}
            if len(self._chosen) == 1:
                index = torch.tensor([[expert for expert in self._chosen[0] if expert in mine]])
            else:
                nobody = module.num_experts
                index = torch.tensor([[e if e in mine else nobody for e in experts] for experts in self._chosen])
            ones = torch.ones(index.shape, dtype=self._dtype)
            self._event = owner.compute.begin(module, self._take_inputs(), index, ones, self._weights)
        return self._event

    def _weights(self, key: ExpertKey) -> Weights:
        return self._owner.format.views(self._owner.file.layout(key.layer), self._lent[key])
