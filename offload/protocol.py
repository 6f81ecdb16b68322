"""What a front end may ask of an engine. Standard library only, so that front ends never import torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from offload.config import SamplingSettings
from offload.events import Event, LiveChanges, RunStats

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``."""


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


class LiveEngine(ChatEngine, Protocol):
    """What can be changed while a model is loaded."""

    def change(self, changes: LiveChanges) -> None:
        """Apply ``changes``: at once between two answers, and while one is generated before its next event is yielded
        or its next token computed. What is resident stays.

        Raises UsageError, with the names that exist, for what does not exist or cannot be changed; nothing is changed
        then.
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

    def ordinary_ids(self) -> list[int]:
        """Ids that stand for text: in the vocabulary of model and tokenizer, neither special nor an end token."""
        ...

    def reset(self) -> None:
        """Forget the conversation, so that the next prompt is prefilled anew. The expert cache stays as it is."""
        ...

    def lap(self) -> RunStats:
        """Statistics since the lap before (or the opening), the running generation up to its last event included."""
        ...
