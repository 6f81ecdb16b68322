"""Decoding one token as graphs: between two experts modules everything is one launch.

A pass is recorded as the model runs it, without any change to the model: where it calls the experts function, a graph
ends, the experts run as they always do, and the next graph begins. A replay is those graphs with the experts between
them, and none of the model's Python. (torch.compile would come to the same cuts, but makes two graphs a layer, checks
its guards each time, and needs the model's Python between them.)

The first token of a size of the KV cache runs without graphs on the static cache, watched for what no graph can hold;
the second one is recorded. All of them have the same operations on the same shapes, and so the same bits. One size has
graphs at a time; they hold memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from offload.config import format_size
from offload.devices.base import Device
from offload.devices.graphs import Graph, GraphError, GraphRecorder
from offload.events import GraphUse
from offload.model.experts import ExpertRuntime
from offload.model.kv_cache import Borrower, KVState
from offload.model.static_cache import StaticCache, why_not_static

_LEAST_SIZE = 256
"""Attention looks at this many places of the KV cache at least; more are powers of two."""


@dataclass(slots=True)
class _Step:
    """A graph, and the experts module behind it with what it is called with; ``output`` is where the next graph looks
    for what it returned."""

    graph: Graph
    module: Any
    layer: int
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    output: torch.Tensor


class _InExperts(Exception):
    """An error of the experts, which has nothing to do with graphs."""


class DecodeGraphs(Borrower):
    """Runs decode passes of one conversation. On the engine's thread, inside the device's ``running()``.

    ``reason`` is why it does not, once that is known; ``notice`` is told of it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: Device,
        recorder: GraphRecorder,
        runtime: ExpertRuntime,
        kv: KVState,
        capacity: int,
        most_bytes: int,
        options: dict[str, Any],
        notice: Callable[[str], None],
    ) -> None:
        """``most_bytes``: of the device's memory, that the plan has left for graphs. ``options``: of the model's
        forward."""
        self.reason: str | None = None
        self.replayed = self.launches = self.graphs = self.held_bytes = 0
        self._model = model
        self._device = device
        self._recorder = recorder
        self._runtime = runtime
        self._kv = kv
        self._capacity = capacity
        self._most_bytes = most_bytes
        self._options = options
        self._notice = notice
        self._cache: StaticCache | None = None
        self._token = torch.empty(0)
        self._steps: list[_Step] = []
        self._last: Graph | None = None
        self._logits = torch.empty(0)
        self._rehearsed: set[int] = set()
        self._borrowed = 0  # tokens of the cache, while it is here
        if (kind := why_not_static(kv.cache)) is not None:
            self._stop(f"the KV cache of this family has layers ({kind}) that cannot stay where they are")
        kv.borrower = self

    def use(self) -> GraphUse:
        return GraphUse(self.reason is None, self.reason, self.graphs, self.launches, self.replayed, self.held_bytes)

    def run(self, token: int) -> torch.Tensor | None:
        """The logits [1, V] behind ``token``, on the device; None: it must be run without graphs.

        Raises what experts raise. The KV cache then has what it had before.
        """
        before = len(self._kv.tokens)
        if self.reason is not None or before == 0:
            return None
        try:
            cache = self._entered(before)
            self._token.fill_(token)
            cache.position.index.fill_(before)
            if self._last is not None:
                logits = self._replay(self._last)
            elif cache.size in self._rehearsed:
                logits = self._record(cache)
            else:
                logits = self._rehearse(cache)
        except _InExperts as error:
            assert error.__cause__ is not None
            raise error.__cause__ from None
        except GraphError as error:
            self._stop(str(error))
            return None
        self._borrowed = before + 1
        return logits

    def give_back(self) -> None:
        borrowed, self._borrowed = self._borrowed, 0
        if borrowed and self._cache is not None:
            with torch.inference_mode(), self._device.running():
                self._cache.leave(borrowed)

    def forget(self, release: bool) -> None:
        self._borrowed = 0
        if release:
            self._drop()

    def close(self) -> None:
        self._drop()
        self._kv.borrower = None

    def _entered(self, tokens: int) -> StaticCache:
        """The cache for a token behind so many. Its size follows from them alone, so that their bits do."""
        size = _LEAST_SIZE
        while size <= tokens:
            size *= 2
        size = min(size, self._capacity)
        cache = self._cache
        if self._borrowed and cache is not None and cache.size == size:
            return cache
        source = self._kv.cache  # gives back what is here
        if cache is None or cache.size != size or not cache.adopt(source):
            self._drop()
            device = self._device.torch_device
            cache = self._cache = StaticCache(source, size, device)
            self._token = torch.zeros((1, 1), dtype=torch.long, device=device)
        cache.enter(tokens)
        self._borrowed = tokens
        return cache

    def _forward(self, cache: StaticCache) -> torch.Tensor:
        cache.position.begin_pass()
        output = self._model(input_ids=self._token, past_key_values=cache, use_cache=True, **self._options)
        logits: torch.Tensor = output.logits[0]
        return logits

    def _rehearse(self, cache: StaticCache) -> torch.Tensor:
        watch = self._recorder.watch()

        def experts(module: Any, layer: int, *given: torch.Tensor) -> torch.Tensor:
            watch.paused = True
            result = self._experts(module, layer, *given)
            watch.paused = False
            return result

        logits = self._with(experts, lambda: self._watched(watch, cache), make_room=True)
        if watch.waits is not None:
            raise GraphError(f"the host waits for a value in the middle of a pass ({watch.waits})")
        if not cache.unmoved():
            raise GraphError("this family puts tensors of its own into the KV cache")
        self.launches = watch.launches
        self._rehearsed.add(cache.size)
        return logits

    def _watched(self, watch: Any, cache: StaticCache) -> torch.Tensor:
        with watch:
            return self._forward(cache)

    def _record(self, cache: StaticCache) -> torch.Tensor:
        recorder = self._recorder
        tokens = len(self._kv.tokens)
        self.give_back()  # should this fail, the conversation goes on from there
        cache.enter(tokens)
        self._borrowed = tokens
        before = self._device.free_memory()
        steps: list[_Step] = []

        def experts(module: Any, layer: int, *given: torch.Tensor) -> torch.Tensor:
            graph = recorder.end()
            output = self._experts(module, layer, *given).clone()  # it may be a buffer that is used again
            steps.append(_Step(graph, module, layer, given, output))  # type: ignore[arg-type]
            recorder.begin()
            return output

        recorder.prepare()
        recorder.begin()
        try:
            self._logits = self._with(experts, lambda: self._forward(cache))
            self._last = recorder.end()
        finally:
            recorder.abort()
        self._steps = steps
        self.graphs = len(steps) + 1
        after = self._device.free_memory()
        self.held_bytes = max(0, before - after) if before is not None and after is not None else 0
        if self.held_bytes > self._most_bytes:
            held, most = format_size(self.held_bytes), format_size(self._most_bytes)
            raise GraphError(f"they take {held}, and the plan has {most} for them")
        return self._logits

    def _replay(self, last: Graph) -> torch.Tensor:
        for step in self._steps:
            step.graph.replay()
            step.output.copy_(self._experts(step.module, step.layer, *step.given))
        last.replay()
        self.replayed += 1
        return self._logits

    def _experts(self, module: Any, layer: int, *given: torch.Tensor) -> torch.Tensor:
        try:
            return self._runtime.run(module, layer, *given)
        except Exception as error:
            raise _InExperts from error

    def _with(
        self, experts: Callable[..., torch.Tensor], forward: Callable[[], torch.Tensor], make_room: bool = False
    ) -> torch.Tensor:
        """What ``forward`` gives, with ``experts`` in the place of the experts function.

        Errors are GraphErrors, with ``make_room`` all but those of the device's memory, for which there is help.
        """
        self._runtime.instead = experts
        try:
            return forward()
        except (_InExperts, GraphError):
            raise
        except Exception as error:  # of the library's code, or of the card's driver: there is always another way
            if make_room and self._device.out_of_memory(error):
                raise
            text = " ".join(str(error).split())[:200]
            raise GraphError(f"{type(error).__name__}: {text}") from error
        finally:
            self._runtime.instead = None

    def _stop(self, reason: str) -> None:
        self.reason = reason
        self._borrowed = 0  # what failed is not worth handing back
        self._drop()
        self._notice(f"no graphs: {reason}; the skeleton's operations are launched one by one")

    def _drop(self) -> None:
        """Give the memory of the graphs back."""
        self._steps, self._last, self._logits, self._cache = [], None, torch.empty(0), None
        self._recorder.released()
