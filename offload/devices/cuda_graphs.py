"""CUDA graphs: what a stream was given while it captured, launched by one call.

Captures are made on a stream of their own, replays go to the stream of the kernels. The graphs of a set share one pool
of memory: they run in the order in which they were captured, so what one is done with the next may use. Other threads
may copy while a capture goes on.
"""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import torch

from offload.devices.graphs import Graph, GraphRecorder

_ERRORS = "thread_local"  # other threads may do what a capture must not: they pin memory and ask events
_WIDTH = 64


class _CudaGraph(Graph):
    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def replay(self) -> None:
        self._graph.replay()


class CudaGraphs(GraphRecorder):
    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._stream: Any = None
        self._pool: Any = None
        self._graph: Any = None
        self._inside = contextlib.ExitStack()

    def prepare(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # the pool's blocks are new ones, and a capture cannot make room for them
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
            self._warm_up()
        self._pool = torch.cuda.graph_pool_handle()
        gc.collect()  # nothing should be freed in the middle of a capture

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._inside.enter_context(torch.cuda.stream(self._stream))
        self._graph.capture_begin(pool=self._pool, capture_error_mode=_ERRORS)

    def end(self) -> Graph:
        graph, self._graph = self._graph, None
        with self._inside.pop_all():
            graph.capture_end()
        graph.replay()  # a capture runs nothing
        return _CudaGraph(graph)

    def abort(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            with contextlib.suppress(RuntimeError), self._inside.pop_all():  # the capture is broken, and says so
                graph.capture_end()

    def released(self) -> None:
        if self._pool is not None:
            self._pool = None
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    def _warm_up(self) -> None:
        """Let the libraries take their workspaces for this stream: it must not happen in a capture."""
        with torch.cuda.stream(self._stream), torch.inference_mode():
            states = torch.zeros(1, _WIDTH, dtype=self._dtype, device=self._device)
            weight = torch.zeros(_WIDTH, _WIDTH, dtype=self._dtype, device=self._device)
            torch.nn.functional.linear(states, weight)
            torch.nn.functional.linear(states, weight, weight[0])
