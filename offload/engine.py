"""The engine: opens a model under a budget and answers with a stream of events. All that a front end sees.

Thread ownership: one thread, the one that iterates :meth:`Engine.generate`, owns the model, the KV cache and the expert
cache. Only the disk lane's workers run beside it, and they touch nothing but the slot they were given, and where rows
decode a thread that makes the noise of their next draws. From other threads only :meth:`Engine.cancel` and
:meth:`Engine.snapshot` may be called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, PreTrainedModel

from cache.cache_log import LoggedCache
from cache.policies import PolicyContext, PolicyError, make_policy
from cache.trace import TraceRecorder
from offload.changes import apply_changes
from offload.checkpoint.expert_file import ExpertFile
from offload.compute.threads import TorchThreads
from offload.config import EngineSettings, SamplingSettings
from offload.errors import Cancelled, RunLocalError, UsageError
from offload.events import Done, Event, FinishReason, LiveChanges, Notice, PrefillProgress, RowEvent, RunStats, Token
from offload.generation.answer import AnswerForm, AnswerText
from offload.generation.passes import Passes
from offload.generation.row_passes import RowPasses
from offload.generation.sampling import Sampler, stop_ids
from offload.generation.scoring import score_chunk, score_pieces
from offload.graph_choice import GraphChoice
from offload.host_side import HostSide
from offload.learning import check_earlier
from offload.live import LiveMethods, LiveView, Recording, Watched, save_file
from offload.memory.process import rss_bytes
from offload.memory.resize import Rooms
from offload.memory.storage import AnyPlan, Storage, make_host_policy
from offload.memory.work import Work
from offload.meter import Meter, RunLabels, Tally, run_stats
from offload.model.experts import ExpertRuntime
from offload.model.families import needs_whole_prompts
from offload.model.host_experts import HostExperts
from offload.model.kv_cache import KVState
from offload.model.prefetch import Prefetcher, make_prefetcher
from offload.model.prompt import PromptEncoder, checked_ids, fitting_ids
from offload.model.transformers_api import ExpertsModule
from offload.model.work import model_work
from offload.protocol import Message, OnLoad, PreparedRow, TakeRow

if TYPE_CHECKING:
    from offload.memory.planned import PlannedModel


def open_engine(settings: EngineSettings, on_event: OnLoad) -> Engine:
    """Open ``settings.model``: download or build, plan, pack, load. Progress and notices go to ``on_event``.

    Raises RunLocalError with the remedy.
    """
    from offload.opening import open_model

    if settings.learn_from and settings.cache_log is not None:
        raise UsageError("--cache-log cannot be combined with --learn-from: a log must hold all that the cache knew")
    try:
        make_policy(settings.policy, PolicyContext(settings.scope, training=check_earlier(settings.learn_from)))
    except PolicyError as error:
        raise UsageError(f"--policy: {error}") from error
    make_host_policy(settings.host_policy)
    return Engine(**open_model(settings, on_event))


def plan_model(settings: EngineSettings, on_event: OnLoad, hardware: str | None = None) -> PlannedModel:
    """The memory plan of ``settings.model``, from its config alone: no weights are read, packed or downloaded.

    With ``hardware`` it is the plan for that machine, with the speed to expect. Raises UsageError if there is no such.
    """
    from offload.opening import plan_only

    return plan_only(settings, on_event, hardware)


class Engine(LiveMethods):
    """One loaded model with one conversation's KV cache. Implements the engines of :mod:`offload.protocol`."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        threads: TorchThreads,
        encoder: PromptEncoder,
        generation_config: GenerationConfig,
        plan: AnyPlan,
        labels: RunLabels,
        runtime: ExpertRuntime,
        storage: Storage,
        file: ExpertFile,
        live: LiveView,
        new_recorder: Callable[[], TraceRecorder],
        modules: list[ExpertsModule],
        settings: EngineSettings,
        host_side: HostSide | None,
        graphs: GraphChoice,
    ) -> None:
        self._model = model
        self._threads = threads
        self._encoder = encoder
        self._defaults = generation_config
        self._labels = labels
        self._runtime = runtime
        self._storage = storage
        self._device = storage.device
        self._file = file
        self._host_side = host_side
        super().__init__(live, Recording(runtime, new_recorder))
        self._modules = modules
        self._settings = settings
        whole_prompts = needs_whole_prompts(model.config.model_type)
        self._kv = KVState(model.config, plan.sizes.context_tokens, kind=settings.kv_cache, whole_prompts=whole_prompts)
        self._prefill_chunk = plan.sizes.chunk_tokens
        self._session = Tally()
        self._lap = Tally()
        self._meter: Meter | None = None
        self._seed: int | None = None
        self._closed = False
        self._rooms = Rooms(runtime, storage, plan)
        self._passes = Passes(
            model, storage.device, runtime, self._kv, self._rooms, self._prefill_chunk, threads.prompt
        )
        self._passes.use_graphs(graphs, self.context_tokens, plan.sizes.graph_bytes)
        self._form = AnswerForm.of(encoder.tokenizer)
        self._stop_ids = stop_ids(generation_config, encoder.end_ids())
        self._vocabulary: int = model.config.get_text_config().vocab_size
        self._score_chunk = score_chunk(model.dtype.itemsize, self._vocabulary, self._prefill_chunk)
        self._score_tokens = self._score_chunk if whole_prompts else self.context_tokens

    @property
    def model_name(self) -> str:
        return self._labels.model

    @property
    def context_tokens(self) -> int:
        return self.plan.sizes.context_tokens

    @property
    def ram_budget_bytes(self) -> int:
        return self.plan.budget

    @property
    def plan(self) -> AnyPlan:
        """With the slots that the device gave, and those of the last change."""
        return self._rooms.plan

    @property
    def format(self) -> str:
        return self._labels.format

    def generate(self, prompt: str | Sequence[Message], sampling: SamplingSettings) -> Iterator[Event]:
        """See :meth:`offload.protocol.ChatEngine.generate`. The prompt is checked before this returns."""
        return self.generate_ids(self._encoder.encode(prompt), sampling)

    def generate_ids(self, ids: Sequence[int], sampling: SamplingSettings) -> Iterator[Event]:
        """See :meth:`offload.protocol.BenchEngine.generate_ids`. The ids are checked before this returns."""
        ids = fitting_ids(ids, self._vocabulary, self.context_tokens)
        sampler = Sampler(sampling, self._defaults)
        self._seed = sampler.seed
        self._runtime.cancelled.clear()
        return self._generate(ids, sampler, sampling)

    def work(self) -> Work:
        """See :meth:`offload.protocol.BenchEngine.work`."""
        return model_work(self._model, self.plan.sizes, self._modules, self._file.layout)

    @property
    def rows_at_once(self) -> int:
        return self.plan.sizes.rows

    def prepare(self, prompt: str | Sequence[Message], sampling: SamplingSettings) -> PreparedRow:
        """See :meth:`offload.protocol.RowEngine.prepare`."""
        ids = self._encoder.encode(prompt)
        return PreparedRow(tuple(fitting_ids(ids, self._vocabulary, self.context_tokens)), sampling)

    def generate_rows(self, take: TakeRow) -> Iterator[RowEvent]:
        """See :meth:`offload.protocol.RowEngine.generate_rows`. Forgets the conversation.

        Raises UsageError if the engine was opened for one row at a time.
        """
        if self.rows_at_once == 1:
            raise UsageError("this engine answers one row at a time; open it with a larger --batch-size")
        self._kv.reset(release=True)
        self._runtime.cancelled.clear()
        return self._generate_rows(take)

    def cancel(self) -> None:
        self._runtime.cancelled.set()

    def encode(self, text: str) -> list[int]:
        """The ids of ``text`` as a raw prompt. Raises UsageError if there are none."""
        return self._encoder.encode(text)

    @property
    def begin_id(self) -> int | None:
        """The id that the tokenizer puts before every text, if it does so."""
        return self._encoder.begin_id

    def ordinary_ids(self) -> list[int]:
        """See :meth:`offload.protocol.BenchEngine.ordinary_ids`."""
        special = self._encoder.special_ids() | self._stop_ids
        size = min(self._vocabulary, len(self._encoder.tokenizer))
        return [token for token in range(size) if token not in special] or list(range(self._vocabulary))

    @property
    def vocabulary(self) -> int:
        """How many logits a position has."""
        return self._vocabulary

    @property
    def score_tokens(self) -> int:
        """Most tokens that :meth:`score` takes: the context, or less where a family needs its prompts whole."""
        return self._score_tokens

    def score(self, ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """The logits [n, V] of all positions of ``ids``, in order, a few rows at a time, in float32 on the CPU.

        ``ids`` run from an empty KV cache, in chunks that follow from ``--prefill-chunk`` and the size of the
        vocabulary alone, and the KV cache forgets them afterwards, also when the caller stops half-way. A piece may be
        changed in place (under ``torch.inference_mode``).

        Raises UsageError (before the first piece) for ids that are not in the vocabulary or too many, and the error of
        a failed load.
        """
        ids = checked_ids(ids, self._vocabulary)
        if len(ids) > self._score_tokens:
            raise UsageError(f"{len(ids)} tokens are more than the {self._score_tokens} that can be scored at once")
        self._runtime.cancelled.clear()
        return self._score(ids)

    def reset(self) -> None:
        """Forget the conversation, so that the next prompt is prefilled anew. The expert cache stays as it is."""
        self._kv.reset()

    def stats(self) -> RunStats:
        return self._stats_of(self._so_far())

    def lap(self) -> RunStats:
        """See :meth:`offload.protocol.BenchEngine.lap`."""
        now = self._so_far()
        part, self._lap = now.since(self._lap), now
        return self._stats_of(part)

    def _stats_of(self, sums: Tally) -> RunStats:
        stats = run_stats(sums, self._labels, self.plan, self._device, self._seed)
        stats = dataclasses.replace(stats, graphs=self._passes.graph_use)
        prefetcher = self._runtime.predictor
        return dataclasses.replace(stats, prefetch_auto=prefetcher.trial) if prefetcher is not None else stats

    def _so_far(self) -> Tally:
        """Sums since the opening, the running generation included."""
        return self._session.plus(self._meter.read() if self._meter is not None else Tally())

    def _watched(self) -> Watched:
        with self._live.lock:
            sums = self._session.plus(self._meter.peek(self._live.stall_link) if self._meter is not None else Tally())
        stats = self._stats_of(sums)
        return Watched(sums, stats, len(self._kv.tokens), self.plan, self._settings)

    def change(self, changes: LiveChanges) -> None:
        """See :meth:`offload.protocol.LiveEngine.change`."""

        def prefetcher(name: str) -> Prefetcher | None:
            return make_prefetcher(name, self._model, self._modules)

        host_side = self._host_side

        def host_experts(strategy: str) -> HostExperts | None:
            assert host_side is not None
            return host_side.experts(strategy, self._notice)

        plan = self._rooms.planned(changes)
        changes = dataclasses.replace(changes, residency=None, ram=None, vram=None)
        ways = None if host_side is None else host_experts
        self._settings = apply_changes(changes, self._settings, self._runtime, self._modules, prefetcher, ways)
        self._rooms.follow(plan)
        now = self._settings
        self._labels = dataclasses.replace(
            self._labels,
            policy=now.policy,
            scope=now.scope,
            prefetch=now.prefetch,
            miss=None if host_side is None else now.miss,
            host_policy=None if host_side is None else now.host_policy,
        )

    def _notice(self, event: object) -> None:
        """Keep what a change has to say for the next answer."""
        if isinstance(event, Notice):
            self._passes.notices.append(event)

    def rss_bytes(self) -> int:
        return rss_bytes()

    def close(self) -> None:
        """Finish loads in flight, write the trace if one was asked for, give memory back. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._passes.close()
        self._runtime.close()
        if self._host_side is not None:
            self._host_side.close()
        self._storage.close()
        self._file.close()
        cache, recorder = self._runtime.cache, self._runtime.recorder
        outputs: list[tuple[str, Path | None, Callable[[Path], None] | None]] = [
            ("--trace-out", self._settings.trace_out, recorder.save if recorder is not None else None),
            ("--cache-log", self._settings.cache_log, cache.save if isinstance(cache, LoggedCache) else None),
        ]
        for flag, path, save in outputs:
            if path is not None and save is not None:
                save_file(save, path, f"{flag}: ")

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _generate(self, ids: list[int], sampler: Sampler, sampling: SamplingSettings) -> Iterator[Event]:
        """The stream of one answer. Always ends with Done, unless the consumer drops it."""
        meter = self._meter = Meter(self._runtime, self._device)
        tally = meter.tally
        tally.prompt_tokens = len(ids)
        answer = AnswerText(self._encoder.tokenizer, self._form, ids, sampling.stop)
        tokens = list(ids)
        reason: FinishReason = "length"
        failure: str | None = None
        limit = min(len(ids) + sampling.max_new_tokens, self.context_tokens)
        self._passes.requests += 1
        try:
            logits = yield from self._prefill(ids, tally)
            while len(tokens) < limit:
                if self._runtime.cancelled.is_set():
                    raise Cancelled
                with self._threads.decode:
                    token = sampler(tokens, logits)
                tokens.append(token)
                tally.new_tokens += 1
                if tally.new_tokens == 1:
                    meter.first_token()
                ended = token in self._stop_ids and not sampling.ignore_eos
                text, reasoning = answer.add(token, ended)
                yield Token(text, token, reasoning)
                if ended or answer.stopped:
                    reason = "stop"
                    break
                if len(tokens) < limit:
                    logits = self._decode(token, tally)
                    yield from self._said()
        except Cancelled:
            reason = "cancelled"
        except RunLocalError as error:
            reason, failure = "error", str(error)
        finally:
            self._close_meter(meter)
        text, reasoning = answer.flush()
        if text or reasoning:
            yield Token(text, tokens[-1], reasoning)
        stats = self._stats_of(tally)
        yield Done(reason, answer.text, len(ids), tally.new_tokens, stats, failure, answer.reasoning)

    def _prefill(self, ids: list[int], tally: Tally) -> Generator[Event, None, torch.Tensor]:
        """Bring the KV cache up to ``ids``, telling of each chunk; returns the last position's logits [V]."""
        reused = self._kv.keep_prefix(ids)
        yield PrefillProgress(reused, len(ids), reused)
        logits = torch.empty(0)
        for start in range(reused, len(ids), self._prefill_chunk):
            part = ids[start : start + self._prefill_chunk]
            began = self._device.now()
            logits = self._passes.run(part, decode=False, ends=start + len(part) == len(ids))[-1]
            tally.count_pass(self._device.now() - began, [len(part)], decode=False)
            yield from self._said()
            yield PrefillProgress(start + len(part), len(ids), reused)
        return logits

    def _said(self) -> Iterator[Notice]:
        while self._passes.notices:
            yield self._passes.notices.pop(0)

    def _decode(self, token: int, tally: Tally) -> torch.Tensor:
        self._live.start_token()
        began = self._device.now()
        with self._threads.decode:
            logits = self._passes.run([token], decode=True)[-1]
        tally.count_pass(seconds := self._device.now() - began, [1], decode=True)
        self._live.end_token(seconds)
        self._runtime.end_token(seconds)
        return logits

    def _generate_rows(self, take: TakeRow) -> Iterator[RowEvent]:
        meter = self._meter = Meter(self._runtime, self._device)
        passes = RowPasses(
            self._model,
            self._device,
            self._threads,
            self._runtime,
            self._rooms,
            self.plan.sizes,
            meter,
            self._prefill_chunk,
            self._passes.requests,
            self._passes.forwards,
            self._passes.notices,
            self._settings.kv_cache,
        )
        try:
            for event in passes.run(take, self._encoder.tokenizer, self._form, self._stop_ids, self._defaults):
                yield from self._said()
                yield event
        finally:
            self._passes.requests, self._passes.forwards = passes.requests, passes.forwards
            self._close_meter(meter)

    def _score(self, ids: list[int]) -> Iterator[torch.Tensor]:
        """The pieces of :meth:`score`."""
        meter = self._meter = Meter(self._runtime, self._device)
        meter.tally.prompt_tokens = len(ids)
        self._passes.requests += 1
        self.reset()

        def forward(part: list[int], ends: bool) -> torch.Tensor:
            began = self._device.now()
            logits = self._passes.run(part, decode=False, all_positions=True, ends=ends)
            meter.tally.count_pass(self._device.now() - began, [len(part)], decode=False)
            return logits

        try:
            yield from score_pieces(forward, ids, self._score_chunk, self._vocabulary)
        finally:
            self._close_meter(meter)
            self.reset()

    def _close_meter(self, meter: Meter) -> None:
        with self._live.lock:
            self._session.add(meter.read())
            if self._meter is meter:
                self._meter = None
