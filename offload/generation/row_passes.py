"""What a batch of rows needs of an engine: forward passes over its model, counted, and the memory of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from cache.recent import recent_tokens
from offload.compute.threads import TorchThreads
from offload.devices.base import Device
from offload.events import Notice, RowEvent
from offload.generation.answer import AnswerForm
from offload.generation.rows import PassPart, RowBatch, RowHost
from offload.generation.sampling import Sampler
from offload.memory.plan import ModelSizes
from offload.memory.resize import Rooms
from offload.meter import Meter
from offload.model.experts import ExpertRuntime
from offload.model.forward_pass import ForwardPass
from offload.model.packed import RowAttention, Segment
from offload.model.row_cache import RowCaches
from offload.protocol import PreparedRow, TakeRow


class RowPasses:
    """One batch. ``first_request`` and ``first_forward`` number its rows and passes in the routing trace; ``notices``
    collects what a front end should say.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: Device,
        threads: TorchThreads,
        runtime: ExpertRuntime,
        rooms: Rooms,
        sizes: ModelSizes,
        meter: Meter,
        chunk: int,
        first_request: int,
        first_forward: int,
        notices: list[Notice],
        kv_cache: str,
    ) -> None:
        self.requests, self.forwards = first_request, first_forward
        self._model = model
        self._device = device
        self._threads = threads
        self._runtime = runtime
        self._rooms = rooms
        self._notices = notices
        self._kv_cache = kv_cache
        self._sizes = sizes
        self._meter = meter
        self._chunk = chunk
        self._first = first_request
        self._attention = RowAttention(model)

    def run(
        self, take: TakeRow, tokenizer: Any, form: AnswerForm, stop_ids: frozenset[int], defaults: GenerationConfig
    ) -> Iterator[RowEvent]:
        """See :meth:`offload.protocol.RowEngine.generate_rows`."""
        sizes = self._sizes
        host = RowHost(
            tokenizer=tokenizer,
            form=form,
            stop_ids=stop_ids,
            sampler=lambda sampling: Sampler(sampling, defaults),
            run=self._pass,
            decoding=self._threads.decode,
            make_room=self._make_room,
            cancelled=self._runtime.cancelled.is_set,
            on_admit=self._on_admit,
            on_token=self._on_token,
            on_shared=self._meter.tally.count_shared,
        )
        caches = RowCaches(self._model.config, sizes.row_memory, sizes.kv_bytes, sizes.context_tokens, self._kv_cache)
        with self._attention.entered():
            yield from RowBatch(host, caches, sizes.rows, self._chunk, sizes.context_tokens).run(take)

    @torch.inference_mode()
    def _pass(self, segments: list[Segment], parts: list[PassPart]) -> torch.Tensor:
        decode = all(part.decode for part in parts)
        of_rows = [(self._first + part.row, part.start, part.count, part.decode) for part in parts]
        recent = recent_tokens((part.count, part.ends) for part in parts)
        self._runtime.current = ForwardPass(*of_rows[0][:2], self.forwards, decode, of_rows, recent)
        self.forwards += 1
        began = self._device.now()
        with self._device.running(), self._threads.decode if decode else self._threads.prompt:
            self._runtime.begin_pass(sum(part.count for part in parts))
            logits = self._attention.run(segments, self._device.torch_device).to("cpu")
        seconds = self._device.now() - began
        self._meter.tally.count_pass(seconds, [part.count for part in parts], decode)
        if decode:
            self._runtime.end_token(seconds / len(parts))
        return logits

    def _make_room(self, error: Exception) -> bool:
        if not self._device.out_of_memory(error):
            return False
        self._notices.append(Notice(self._rooms.make_room(error)))
        return True

    def _on_admit(self, row: PreparedRow) -> None:
        self.requests += 1
        self._meter.tally.prompt_tokens += len(row.ids)

    def _on_token(self) -> None:
        self._meter.tally.new_tokens += 1
        if self._meter.tally.new_tokens == 1:
            self._meter.first_token()
