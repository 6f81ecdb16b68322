"""What a front end may ask of an engine. Standard library only, so that front ends never import torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from offload.config import EngineSettings, SamplingSettings
from offload.events import CacheSnapshot, Event, LiveChanges, LoadProgress, Notice, Planned, RowEvent, RunStats
from offload.memory.work import Work

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``; an answer may have ``reasoning_content``, too."""


class ChatEngine(Protocol):
    """One loaded model with one conversation's KV cache. Not thread-safe, except :meth:`cancel`."""

    @property
    def model_name(self) -> str: ...

    @property
    def context_tokens(self) -> int:
        """Most tokens that prompt and answer together may have."""
        ...

    @property
    def ram_budget_bytes(self) -> int: ...

    def generate(self, prompt: str | Sequence[Message], sampling: SamplingSettings) -> Iterator[Event]:
        """Answer a raw prompt (a string, tokenised as it is) or a conversation (through the chat template).

        Yields events and ends with one ``Done``. Errors while generating end the stream with reason "error".

        Raises (before the first event): ``ContextError`` if the prompt does not fit, ``UsageError`` if it is empty
        or the model has no chat template.
        """
        ...

    def cancel(self) -> None:
        """Stop the running generation soon (between tokens, or inside a long prefill). Safe from any thread."""
        ...

    def stats(self) -> RunStats:
        """Totals since the engine was opened."""
        ...

    def rss_bytes(self) -> int:
        """Resident memory of the process now."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """One row of a batch as it will run: the ids of its prompt, which fit the context, and how to go on."""

    ids: tuple[int, ...]
    sampling: SamplingSettings

    def most_tokens(self, context: int) -> int:
        """Tokens of prompt and answer together, if nothing ends the answer early."""
        return min(context, len(self.ids) + self.sampling.max_new_tokens)


TakeRow = Callable[[int], PreparedRow | None]
"""Asked for the next row, of at most so many tokens; None: there is none, or none that fits now."""


@runtime_checkable
class RowEngine(Protocol):
    """An engine that answers many rows at once. Its rows share forward passes, and nothing else."""

    @property
    def rows_at_once(self) -> int:
        """How many rows share a pass; 1 where the model or the settings allow no more."""
        ...

    def prepare(self, prompt: str | Sequence[Message], sampling: SamplingSettings) -> PreparedRow:
        """Check and encode a row. Raises ``ContextError`` and ``UsageError`` as ``generate`` does."""
        ...

    def generate_rows(self, take: TakeRow) -> Iterator[RowEvent]:
        """Answer the rows that ``take`` gives whenever there is room for one; it ends when there is none and nothing is
        in flight. With nothing in flight there is room for any.

        Yields a ``RowsPass`` after each forward pass, one ``RowDone`` for each row that was taken, as it ends, and a
        ``Notice`` for what the user should see.
        ``cancel`` ends all rows in flight with reason "cancelled", and takes no other.
        """
        ...


class BenchEngine(ChatEngine, Protocol):
    """What measuring takes beside chatting."""

    def generate_ids(self, ids: Sequence[int], sampling: SamplingSettings) -> Iterator[Event]:
        """As :meth:`ChatEngine.generate`, for a prompt of token ids.

        Raises (before the first event): ``ContextError`` if the ids do not fit, ``UsageError`` if there are none or one
        is not in the vocabulary.
        """
        ...

    def work(self) -> Work:
        """What a forward pass of this model has to do."""
        ...

    def ordinary_ids(self) -> list[int]:
        """Ids that stand for text: in the vocabulary of model and tokenizer, neither special nor an end token."""
        ...

    def reset(self) -> None:
        """Forget the conversation, so that the next prompt is prefilled anew. The expert cache stays as it is."""
        ...

    def lap(self) -> RunStats:
        """Statistics since the lap before (or the opening), the running generation up to its last event included."""
        ...


@dataclass(frozen=True, slots=True)
class TuneReport:
    """What suits the routing of a talk. ``found`` is what ``tune --json`` prints; ``changes`` make the engine follow
    the advice (all None: what it has is best), ``flags`` make another run do so. ``notes`` are lines for the user."""

    found: Mapping[str, Any]
    changes: LiveChanges
    flags: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


class TuneJob(Protocol):
    """A sweep over the routing of a talk up to a moment. It needs the engine no longer."""

    def __call__(self, on_event: Callable[[LoadProgress], None]) -> TuneReport:
        """Run it, on any thread; the replays have processes of their own. What ``on_event`` raises ends it, and comes
        out of here.

        Raises RunLocalError if nothing can be learned from the trace.
        """
        ...


class LiveEngine(ChatEngine, Protocol):
    """An engine that can be watched and changed while it answers."""

    def snapshot(self) -> CacheSnapshot:
        """A copy of the cache's state and of the counters so far. Cheap, and safe from any thread."""
        ...

    def change(self, changes: LiveChanges) -> None:
        """Apply ``changes`` between tokens; what is resident stays. On the thread that iterates :meth:`generate`.

        Raises UsageError, with the names that exist, for a value that makes no sense; nothing is changed then.
        """
        ...

    @property
    def choices(self) -> Mapping[str, Sequence[str]]:
        """The names that exist for the fields of LiveChanges that this engine can change by name."""
        ...

    def start_trace(self) -> None:
        """Record the routing from now on. On the engine's thread. Raises UsageError if it is being recorded already."""
        ...

    def stop_trace(self, path: Path) -> int:
        """End the recording and write it to ``path``; returns its rows. On the engine's thread.

        Raises UsageError if :meth:`start_trace` began none, RunLocalError if it cannot be written (it goes on then).
        """
        ...

    def tune_job(self) -> TuneJob:
        """A sweep over what was recorded so far, for the slots that there are. On the engine's thread; cheap.

        Raises UsageError if nothing is being recorded or nothing was.
        """
        ...

    def expert_score(self, layer: int, expert: int) -> float | None:
        """What the policy goes by: of the resident records the one with the lowest score goes first. None: it keeps no
        scores, or knows nothing of this one. Safe from any thread; may be that of a moment before.
        """
        ...


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A model that can be opened without a download. ``name`` is what ``--model`` takes; ``bytes`` None: not known."""

    name: str
    kind: str
    format: str
    bytes: int | None
    remark: str = ""


OnLoad = Callable[[LoadProgress | Notice | Planned], None]


class EngineHost(Protocol):
    """Opens engines and knows what is on this machine. Its methods may take long: not for the thread of a screen."""

    def open(self, settings: EngineSettings, on_event: OnLoad) -> LiveEngine:
        """Open a model. What ``on_event`` raises ends the opening, and comes out of here."""
        ...

    def close(self, engine: LiveEngine) -> None:
        """Close it and write what is written at the end. Raises RunLocalError if that fails; it is closed then, too."""
        ...

    def models(self) -> list[ModelChoice]:
        """What is on this machine: the demo, packs, models of the hub's cache."""
        ...
