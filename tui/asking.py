"""Ask an engine a question of a conversation: what both front ends do the same way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from offload.config import SamplingSettings
from offload.errors import ContextError
from offload.events import Done, Event
from offload.protocol import ChatEngine
from tui.conversation import Conversation, Turn


@dataclass(frozen=True, slots=True)
class Started:
    """An answer on its way: its events, and the turns that it is based on, of which ``dropped`` older ones are not."""

    events: Iterator[Event]
    kept: Sequence[Turn]
    dropped: int

    def tell_dropped(self) -> str | None:
        """What to say about turns that were dropped."""
        if not self.dropped:
            return None
        turns = "oldest turn was" if self.dropped == 1 else f"{self.dropped} oldest turns were"
        return f"the context is full: the {turns} dropped"


def start_answer(
    engine: ChatEngine, conversation: Conversation, base: Sequence[Turn], question: str, sampling: SamplingSettings
) -> Started:
    """Begin an answer to ``question`` after ``base``, less its oldest turns while they do not fit the context.

    Raises ContextError if the question alone does not fit, RunLocalError if it cannot be asked.
    """
    for dropped in range(len(base) + 1):
        kept = base[dropped:]
        try:
            events = iter(engine.generate(conversation.messages(kept, question), sampling))
            first = next(events)  # an engine written as a generator raises only here
        except ContextError as error:
            problem = error
            continue
        return Started(chain([first], events), kept, dropped)
    raise ContextError(
        f"the question does not fit the context, even without the turns before it: {problem.prompt_tokens} tokens "
        f"of {problem.context_tokens}; shorten it, or start with a larger --ctx",
        problem.prompt_tokens,
        problem.context_tokens,
    )


def nth_sampling(sampling: SamplingSettings, asked: int) -> SamplingSettings:
    """Of the ``asked``-th answer: with one seed for every answer a retry could only repeat the last one."""
    seed = sampling.seed
    return sampling if seed is None else replace(sampling, seed=(seed + asked) % 2**63)


def how_stopped(done: Done, became_turn: bool) -> str:
    """What to say about an answer of reason "cancelled"."""
    if became_turn:
        return "stopped"
    return "stopped before the first token" if not done.new_tokens else "stopped before the answer began"


def why_cut(done: Done, sampling: SamplingSettings) -> str:
    """What ended an answer of reason "length"."""
    limit = sampling.max_new_tokens
    return f"--max-new-tokens {limit}" if done.new_tokens >= limit else "the context is full (--ctx)"
