"""Graphs of the pretend GPU: their operations take as long as ever, and are launched together."""

from __future__ import annotations

from typing import Any

import torch

from offload.devices.clock import VirtualClock
from offload.devices.graphs import Graph
from offload.devices.recorded import OperationRecorder, Place, RecordedGraph
from offload.devices.simulated.tensor import SimTensor


class _SimGraph(Graph):
    def __init__(self, inner: Graph, clock: VirtualClock) -> None:
        self._inner = inner
        self._clock = clock

    def replay(self) -> None:
        with self._clock.graph():
            self._inner.replay()


class SimGraphs(OperationRecorder):
    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock

    def graph(self, operations: list[Any], alive: dict[int, Place]) -> Graph:
        return _SimGraph(RecordedGraph(operations, alive, self.unwrap), self._clock)

    def unwrap(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.elem if isinstance(tensor, SimTensor) else tensor
