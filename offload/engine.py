"""The engine: opens a model under a budget and answers with a stream of events. All that a front end sees.

Thread ownership: one thread, the one that iterates :meth:`Engine.generate`, owns the model, the KV cache and the expert
cache. Only the disk lane's workers run beside it, and they touch nothing but the slot they were given. From other
threads only :meth:`Engine.cancel` and :meth:`Engine.snapshot` may be called.
"""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import torch
from transformers import GenerationConfig, PreTrainedModel

from cache.cache_log import LoggedCache
from cache.policies import PolicyContext, PolicyError, make_policy
from cache.trace import TraceRecorder
from offload.changes import apply_changes
from offload.checkpoint.expert_file import ExpertFile
from offload.config import EngineSettings, SamplingSettings
from offload.devices import SlotArena
from offload.errors import Cancelled, ContextError, RunLocalError, UsageError
from offload.events import Done, Event, FinishReason, LiveChanges, PrefillProgress, RowEvent, RunStats, Token
from offload.generation.row_passes import RowPasses
from offload.generation.sampling import Sampler, stop_ids
from offload.generation.text import Detokenizer, StopStrings
from offload.learning import check_earlier
from offload.live import LiveMethods, LiveView, Recording, Watched, save_file
from offload.memory.lanes import DiskLane
from offload.memory.plan import Plan
from offload.memory.process import rss_bytes
from offload.memory.work import Work
from offload.meter import Meter, RunLabels, Tally, run_stats
from offload.model.experts import ExpertRuntime, ForwardPass
from offload.model.families import needs_whole_prompts
from offload.model.kv_cache import KVState
from offload.model.prefetchers import Prefetcher, make_prefetcher
from offload.model.prompt import PromptEncoder
from offload.model.transformers_api import ExpertsModule
from offload.model.work import model_work
from offload.protocol import Message, OnLoad, PreparedRow, TakeRow

_SCORED_LOGITS_BYTES = 32 * 2**20
"""Most logits that one forward pass of :meth:`Engine.score` makes. The plan counts those of one position: these live on
its margin, and on what a pass of fewer tokens leaves of its activations."""
_SCORED_PIECE_BYTES = 2 * 2**20
SEED_TOKENS = 8
"""So many last tokens of a prompt tell the expert cache what decoding is likely to use."""


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
    return Engine(**open_model(settings, on_event))


def plan_model(settings: EngineSettings, on_event: OnLoad) -> Plan:
    """The memory plan of ``settings.model``, from its config alone: no weights are read, packed or downloaded."""
    from offload.opening import plan_only

    return plan_only(settings, on_event)


class Engine(LiveMethods):
    """One loaded model with one conversation's KV cache. Implements :class:`offload.protocol.BenchEngine` and
    :class:`offload.protocol.LiveEngine`."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        decoding: AbstractContextManager[None],
        encoder: PromptEncoder,
        generation_config: GenerationConfig,
        plan: Plan,
        labels: RunLabels,
        runtime: ExpertRuntime,
        lane: DiskLane,
        file: ExpertFile,
        arena: SlotArena,
        live: LiveView,
        new_recorder: Callable[[], TraceRecorder],
        modules: list[ExpertsModule],
        settings: EngineSettings,
    ) -> None:
        self._model = model
        self._decoding = decoding
        self._encoder = encoder
        self._defaults = generation_config
        self._plan = plan
        self._labels = labels
        self._runtime = runtime
        self._lane = lane
        self._file = file
        self._arena = arena
        super().__init__(live, Recording(runtime, new_recorder))
        self._modules = modules
        self._settings = settings
        whole_prompts = needs_whole_prompts(model.config.model_type)
        self._kv = KVState(model.config, plan.sizes.context_tokens, whole_prompts=whole_prompts)
        self._prefill_chunk = plan.sizes.context_tokens if whole_prompts else settings.prefill_chunk
        self._session = Tally()
        self._lap = Tally()
        self._meter: Meter | None = None
        self._seed: int | None = None
        self._requests = self._forwards = 0
        self._closed = False
        self._stop_ids = stop_ids(generation_config, encoder.eos_id)
        accepted = inspect.signature(model.forward).parameters
        self._forward_options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._vocabulary: int = model.config.get_text_config().vocab_size
        scored = max(1, _SCORED_LOGITS_BYTES // (model.dtype.itemsize * self._vocabulary))
        self._score_chunk = min(scored, self._prefill_chunk)
        self._score_tokens = self._score_chunk if whole_prompts else self.context_tokens

    @property
    def model_name(self) -> str:
        return self._labels.model

    @property
    def context_tokens(self) -> int:
        return self._plan.sizes.context_tokens

    @property
    def ram_budget_bytes(self) -> int:
        return self._plan.budget

    @property
    def plan(self) -> Plan:
        return self._plan

    @property
    def format(self) -> str:
        return self._labels.format

    def generate(self, prompt: str | Sequence[Message], sampling: SamplingSettings) -> Iterator[Event]:
        """See :meth:`offload.protocol.ChatEngine.generate`. The prompt is checked before this returns."""
        return self.generate_ids(self._encoder.encode(prompt), sampling)

    def generate_ids(self, ids: Sequence[int], sampling: SamplingSettings) -> Iterator[Event]:
        """See :meth:`offload.protocol.BenchEngine.generate_ids`. The ids are checked before this returns."""
        ids = self._fitting(ids)
        sampler = Sampler(sampling, self._defaults)
        self._seed = sampler.seed
        self._runtime.cancelled.clear()
        return self._generate(ids, sampler, sampling)

    def work(self) -> Work:
        """See :meth:`offload.protocol.BenchEngine.work`."""
        return model_work(self._model, self._plan.sizes, len(self._modules), self._labels)

    @property
    def rows_at_once(self) -> int:
        return self._plan.sizes.rows

    def prepare(self, prompt: str | Sequence[Message], sampling: SamplingSettings) -> PreparedRow:
        """See :meth:`offload.protocol.RowEngine.prepare`."""
        return PreparedRow(tuple(self._fitting(self._encoder.encode(prompt))), sampling)

    def generate_rows(self, take: TakeRow) -> Iterator[RowEvent]:
        """See :meth:`offload.protocol.RowEngine.generate_rows`. Forgets the conversation.

        Raises UsageError if the engine was opened for one row at a time.
        """
        if self.rows_at_once == 1:
            raise UsageError("this engine answers one row at a time; open it with a larger --batch-size")
        self.reset()
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
        ids = self._checked(ids)
        if len(ids) > self._score_tokens:
            raise UsageError(f"{len(ids)} tokens are more than the {self._score_tokens} that can be scored at once")
        self._runtime.cancelled.clear()
        return self._score(ids)

    def reset(self) -> None:
        """Forget the conversation, so that the next prompt is prefilled anew. The expert cache stays as it is."""
        self._kv.reset()

    def stats(self) -> RunStats:
        return run_stats(self._so_far(), self._labels, self._plan, self._seed)

    def lap(self) -> RunStats:
        """See :meth:`offload.protocol.BenchEngine.lap`."""
        now = self._so_far()
        part, self._lap = now.since(self._lap), now
        return run_stats(part, self._labels, self._plan, self._seed)

    def _so_far(self) -> Tally:
        """Sums since the opening, the running generation included."""
        now = Tally()
        now.add(self._session)
        if self._meter is not None:
            now.add(self._meter.read())
        return now

    def _watched(self) -> Watched:
        with self._live.lock:
            sums = self._session.plus(self._meter.peek() if self._meter is not None else Tally())
        stats = run_stats(sums, self._labels, self._plan, self._seed)
        return Watched(sums, stats, len(self._kv.tokens), self._plan, self._settings)

    def change(self, changes: LiveChanges) -> None:
        """See :meth:`offload.protocol.LiveEngine.change`."""

        def prefetcher(name: str) -> Prefetcher | None:
            return make_prefetcher(name, self._model, self._modules)

        self._settings = apply_changes(changes, self._settings, self._runtime, self._modules, prefetcher)
        now = self._settings
        self._labels = dataclasses.replace(self._labels, policy=now.policy, scope=now.scope, prefetch=now.prefetch)

    def rss_bytes(self) -> int:
        return rss_bytes()

    def close(self) -> None:
        """Finish loads in flight, write the trace if one was asked for, give memory back. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._runtime.close()
        self._lane.close()
        self._file.close()
        self._arena.close()
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
        meter = self._meter = Meter(self._runtime.cache, self._runtime, self._lane)
        tally = meter.tally
        tally.prompt_tokens = len(ids)
        detokenizer = Detokenizer(self._encoder.tokenizer, ids)
        stops = StopStrings(sampling.stop)
        tokens = list(ids)
        shown: list[str] = []
        reason: FinishReason = "length"
        failure: str | None = None
        limit = min(len(ids) + sampling.max_new_tokens, self.context_tokens)
        self._requests += 1
        try:
            logits = yield from self._prefill(ids, tally)
            while len(tokens) < limit:
                if self._runtime.cancelled.is_set():
                    raise Cancelled
                with self._decoding:
                    token = sampler(tokens, logits)
                tokens.append(token)
                tally.new_tokens += 1
                if tally.new_tokens == 1:
                    meter.first_token()
                ended = token in self._stop_ids and not sampling.ignore_eos
                text = stops.add(detokenizer.flush() if ended else detokenizer.add(token))
                shown.append(text)
                yield Token(text, token)
                if ended or stops.found:
                    reason = "stop"
                    break
                if len(tokens) < limit:
                    logits = self._decode(token, tally)
        except Cancelled:
            reason = "cancelled"
        except RunLocalError as error:
            reason, failure = "error", str(error)
        finally:
            self._close_meter(meter)
        tail = "" if stops.found else stops.add(detokenizer.flush()) + stops.flush()
        if tail:
            shown.append(tail)
            yield Token(tail, tokens[-1])
        stats = run_stats(tally, self._labels, self._plan, self._seed)
        yield Done(reason, "".join(shown), len(ids), tally.new_tokens, stats, failure)

    def _prefill(self, ids: list[int], tally: Tally) -> Generator[Event, None, torch.Tensor]:
        """Bring the KV cache up to ``ids``, telling of each chunk; returns the last position's logits [V]."""
        reused = self._kv.keep_prefix(ids)
        yield PrefillProgress(reused, len(ids), reused)
        logits = torch.empty(0)
        for start in range(reused, len(ids), self._prefill_chunk):
            part = ids[start : start + self._prefill_chunk]
            began = time.perf_counter()
            recent = range(max(0, len(part) - SEED_TOKENS), len(part)) if start + len(part) == len(ids) else ()
            logits = self._forward(part, decode=False, recent=recent)[-1]
            tally.count_pass(time.perf_counter() - began, [len(part)], decode=False)
            yield PrefillProgress(start + len(part), len(ids), reused)
        return logits

    def _decode(self, token: int, tally: Tally) -> torch.Tensor:
        self._live.start_token()
        began = time.perf_counter()
        with self._decoding:
            logits = self._forward([token], decode=True)[-1]
        tally.count_pass(seconds := time.perf_counter() - began, [1], decode=True)
        self._live.end_token(seconds)
        return logits

    def _generate_rows(self, take: TakeRow) -> Iterator[RowEvent]:
        meter = self._meter = Meter(self._runtime.cache, self._runtime, self._lane)
        passes = RowPasses(
            self._model, self._runtime, self._plan, meter, self._prefill_chunk, self._requests, self._forwards
        )
        try:
            yield from passes.run(take, self._encoder.tokenizer, self._stop_ids, self._defaults)
        finally:
            self._requests, self._forwards = passes.requests, passes.forwards
            self._close_meter(meter)

    def _score(self, ids: list[int]) -> Iterator[torch.Tensor]:
        """The pieces of :meth:`score`."""
        meter = self._meter = Meter(self._runtime.cache, self._runtime, self._lane)
        meter.tally.prompt_tokens = len(ids)
        self._requests += 1
        rows = max(1, _SCORED_PIECE_BYTES // (4 * self._vocabulary))
        self.reset()
        try:
            for start in range(0, len(ids), self._score_chunk):
                part = ids[start : start + self._score_chunk]
                began = time.perf_counter()
                logits = self._forward(part, decode=False, all_positions=True)
                meter.tally.count_pass(time.perf_counter() - began, [len(part)], decode=False)
                for piece in logits.split(rows):
                    yield piece.to("cpu", torch.float32, copy=True)  # a view would keep all of them
                del logits, piece  # before the next pass makes its own
        finally:
            self._close_meter(meter)
            self.reset()

    def _checked(self, ids: Sequence[int]) -> list[int]:
        """``ids`` as a list. Raises UsageError if there are none or one is not in the vocabulary."""
        if not ids:
            raise UsageError("the prompt is empty")
        if not 0 <= min(ids) <= max(ids) < self._vocabulary:
            raise UsageError(f"the prompt has token ids outside of the vocabulary (0 to {self._vocabulary - 1})")
        return list(ids)

    def _fitting(self, ids: Sequence[int]) -> list[int]:
        """``ids`` as a list. Raises UsageError as :meth:`_checked` does, ContextError if they do not fit."""
        ids = self._checked(ids)
        if len(ids) >= self.context_tokens:
            raise ContextError(
                f"the prompt has {len(ids)} tokens, but the context holds {self.context_tokens} with at least one new "
                "token; shorten it or give a larger --ctx",
                len(ids),
                self.context_tokens,
            )
        return ids

    def _close_meter(self, meter: Meter) -> None:
        with self._live.lock:
            self._session.add(meter.read())
            if self._meter is meter:
                self._meter = None

    @torch.inference_mode()
    def _forward(
        self, tokens: list[int], *, decode: bool, all_positions: bool = False, recent: Sequence[int] = ()
    ) -> torch.Tensor:
        """Run ``tokens`` on top of the KV cache; returns logits [n, V] that end with the last position's.

        ``all_positions``: those of all tokens. ``recent``: places of the tokens that say what comes next. On any error
        the KV cache forgets what this pass added.
        """
        self._forwards += 1
        self._runtime.current = ForwardPass(
            self._requests - 1, len(self._kv.tokens), self._forwards - 1, decode, recent=[(token,) for token in recent]
        )
        try:
            output = self._model(
                input_ids=torch.tensor([tokens], device=self._model.device),
                past_key_values=self._kv.cache,
                use_cache=True,
                **({} if all_positions else self._forward_options),
            )
        except BaseException:
            self._kv.after_failure()
            raise
        self._kv.tokens += tokens
        logits: torch.Tensor = output.logits[0]
        return logits
