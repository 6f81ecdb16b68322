"""A scripted engine: yields the events it is told to, honours cancel, and can fail. No torch, no model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from offload.config import SamplingSettings
from offload.errors import ContextError
from offload.events import (
    ByteStats,
    Done,
    Event,
    ExpertStats,
    FinishReason,
    MemoryStats,
    PrefillProgress,
    RunStats,
    SecondStats,
    Token,
)
from offload.protocol import Message


@dataclass
class Answer:
    """What one call of generate does.

    ``error`` ends it with reason "error" after the tokens; ``raises`` is raised before the first event. ``waits``:
    after the tokens it goes on until it is cancelled. ``on_token`` is called after each token was consumed. The first
    ``thoughts`` of the tokens are reasoning.
    """

    tokens: Sequence[str] = ("fine", ".")
    reason: FinishReason = "stop"
    error: str | None = None
    raises: Exception | None = None
    waits: bool = False
    held_back: str = ""
    thoughts: int = 0
    on_token: Callable[[int], None] = lambda index: None


def run_stats(prompt_tokens: int = 0, new_tokens: int = 0, measured: bool = True) -> RunStats:
    return RunStats(
        model="fake",
        device="cpu",
        format="native",
        dense_format="native",
        policy="lru",
        prefetch="off",
        seed=1,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        start_s=1.0,
        ttft_s=0.25 if measured else None,
        prefill_tokens_per_s=100.0 if measured else None,
        decode_tokens_per_s=12.34 if measured else None,
        experts=ExpertStats(10, 7, 1, 2, None, 0.7 if measured else None, 0.8 if measured else None, 0, 0, 5, 6),
        bytes=ByteStats(1000, None, 2_500_000.0 if measured else None),
        seconds=SecondStats(1.0, 0.5, None, 1.5),
        memory=MemoryStats(2**30, 2**31, None, None, 10, 0.5),
    )


@dataclass
class FakeEngine:
    """Plays ``answers`` one after the other, then the last one again. Prompts are counted in words."""

    answers: Sequence[Answer] = (Answer(),)
    context_tokens: int = 1000
    measured: bool = True
    model_name: str = "fake"
    ram_budget_bytes: int = 2**31
    prompts: list[str | list[Message]] = field(default_factory=list)
    samplings: list[SamplingSettings] = field(default_factory=list)
    cancels: int = 0
    closed: bool = False
    new_tokens: int = 0
    _cancelled: bool = False

    def generate(self, prompt: str | Sequence[Message], sampling: SamplingSettings) -> Iterator[Event]:
        text = prompt if isinstance(prompt, str) else " ".join(message["content"] for message in prompt)
        words = len(text.split())
        answer = self.answers[min(len(self.prompts), len(self.answers) - 1)]
        if words >= self.context_tokens:
            raise ContextError(f"{words} tokens, but only {self.context_tokens} fit", words, self.context_tokens)
        self.prompts.append(prompt if isinstance(prompt, str) else [dict(message) for message in prompt])
        self.samplings.append(sampling)
        if answer.raises is not None:
            raise answer.raises
        self._cancelled = False
        return self._play(answer, words)

    def _play(self, answer: Answer, words: int) -> Iterator[Event]:
        yield PrefillProgress(0, words, 0)
        yield PrefillProgress(words, words, 0)
        reason, shown = answer.reason, ""
        given = 0
        for index, text in enumerate(answer.tokens):
            if self._cancelled:
                break
            shown += text if index >= answer.thoughts else ""
            given += 1
            yield Token(text, index) if index >= answer.thoughts else Token("", index, text)
            answer.on_token(index)
        while answer.waits and not self._cancelled:
            time.sleep(0.01)
        self.new_tokens += given
        if self._cancelled:
            reason = "cancelled"
        elif answer.error is not None:
            reason = "error"
        shown += answer.held_back
        stats = run_stats(words, given, self.measured)
        thought = "".join(answer.tokens[: min(given, answer.thoughts)])
        yield Done(reason, shown, words, given, stats, answer.error if reason == "error" else None, thought)

    def cancel(self) -> None:
        self.cancels += 1
        self._cancelled = True

    def stats(self) -> RunStats:
        return run_stats(0, self.new_tokens, self.measured)

    def rss_bytes(self) -> int:
        return 2**30

    def close(self) -> None:
        self.closed = True
