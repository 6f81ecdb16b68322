"""Forward passes over one conversation: the model on top of its KV cache, numbered for the routing trace."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import PreTrainedModel

from cache.recent import recent_tokens
from offload.devices.base import Device
from offload.events import GraphUse, Notice
from offload.graph_choice import GraphChoice
from offload.memory.resize import Rooms
from offload.model.experts import ExpertRuntime
from offload.model.forward_pass import ForwardPass
from offload.model.graphs import DecodeGraphs
from offload.model.kv_cache import KVState


class Passes:
    """``requests`` and ``forwards`` count what was begun. ``notices`` collects what a front end should say."""

    def __init__(
        self,
        model: PreTrainedModel,
        device: Device,
        runtime: ExpertRuntime,
        kv: KVState,
        rooms: Rooms,
        chunk: int,
        prompts: AbstractContextManager[None],
    ) -> None:
        """``prompts`` surrounds passes of a prompt's tokens."""
        self.requests = self.forwards = 0
        self.notices: list[Notice] = []
        self._graphs: DecodeGraphs | None = None
        self._graph_use: GraphUse | None = None
        self._model = model
        self._device = device
        self._runtime = runtime
        self._kv = kv
        self._rooms = rooms
        self._chunk = chunk
        self._prompts = prompts
        accepted = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def use_graphs(self, choice: GraphChoice, capacity: int, most_bytes: int) -> None:
        """Decode one token with graphs, if ``choice`` has any. They and what they work on may take ``most_bytes``."""
        if choice.recorder is None:
            self._graph_use = choice.use
            return
        self._graphs = DecodeGraphs(
            self._model,
            self._device,
            choice.recorder,
            self._runtime,
            self._kv,
            capacity,
            most_bytes,
            self._last_only,
            lambda text: self.notices.append(Notice(text)),
        )

    @property
    def graph_use(self) -> GraphUse | None:
        return self._graph_use if self._graphs is None else self._graphs.use()

    def close(self) -> None:
        """Give up the graphs."""
        if self._graphs is not None:
            self._graphs.close()

    def run(self, tokens: list[int], *, decode: bool, all_positions: bool = False, ends: bool = False) -> torch.Tensor:
        """Run ``tokens`` on top of the KV cache; returns logits [n, V] on the CPU that end with the last position's.

        ``all_positions``: those of all tokens. ``ends``: the prompt ends with these. On any error the KV cache forgets
        what this pass added. Where the device's memory is used up, slots are given up until the pass fits;
        :attr:`notices` says so.
        """
        while True:
            before = list(self._kv.tokens)
            try:
                return self._once(tokens, decode, all_positions, ends)
            except Exception as error:
                if not self._device.out_of_memory(error):
                    raise
                self.notices.append(Notice(self._rooms.make_room(error)))
            lost = before[len(self._kv.tokens) :]  # a recurrent state cannot go back a step
            for start in range(0, len(lost), self._chunk):
                self.run(lost[start : start + self._chunk], decode=False)

    @torch.inference_mode()
    def _once(self, tokens: list[int], decode: bool, all_positions: bool, ends: bool) -> torch.Tensor:
        self.forwards += 1
        logits: torch.Tensor
        recent = recent_tokens([(len(tokens), ends)])
        self._runtime.current = ForwardPass(
            self.requests - 1, len(self._kv.tokens), self.forwards - 1, decode, recent=recent
        )
        try:
            with self._device.running(), nullcontext() if decode else self._prompts:
                self._runtime.begin_pass(len(tokens))
                if self._graphs is not None and decode and len(tokens) == 1 and not all_positions:
                    replayed = self._graphs.run(tokens[0])
                    if replayed is not None:
                        logits = replayed.to("cpu", copy=True)  # the next pass writes to the same place
                        self._kv.tokens += tokens
                        return logits
                output = self._model(
                    input_ids=torch.tensor([tokens], device=self._device.torch_device),
                    past_key_values=self._kv.cache,
                    use_cache=True,
                    **({} if all_positions else self._last_only),
                )
                logits = output.logits[0].to("cpu")
        except BaseException:
            self._kv.after_failure()
            raise
        self._kv.tokens += tokens
        return logits
