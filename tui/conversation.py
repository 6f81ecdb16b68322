"""The messages of a chat: always a list that a chat template accepts, whatever was cancelled or went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from offload.events import Done, FinishReason
from offload.protocol import Message


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer. An answer that was stopped is part of the conversation as far as it got. ``reasoning``
    is what the model thought before it answered.
    """

    question: str
    answer: str
    finish_reason: FinishReason
    reasoning: str = ""


@dataclass(slots=True)
class Conversation:
    """A system prompt and complete turns, so that roles always alternate.

    A question without an answer (an error, a cancel before the first token, a refusal) is no turn: it is only kept
    for ``/retry``, as ``pending`` with the turns that it followed.
    """

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    pending: tuple[str, list[Turn]] | None = None

    def messages(self, turns: Sequence[Turn] | None = None, question: str | None = None) -> list[Message]:
        """What the chat template gets: the system prompt, ``turns`` (default: all) and the new question.

        It gets the reasoning, too: the template decides what of it the model sees again (mostly nothing).
        """
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns if turns is None else turns:
            messages.append({"role": "user", "content": turn.question})
            thought = {"reasoning_content": turn.reasoning} if turn.reasoning else {}
            messages.append({"role": "assistant", "content": turn.answer, **thought})
        if question is not None:
            messages.append({"role": "user", "content": question})
        return messages

    def commit(self, kept: Sequence[Turn], question: str, done: Done) -> bool:
        """Take an answer in, after ``kept`` (the turns it was based on). Returns whether it became a turn.

        If not, the turns stay as they were: an answer that a retry was to replace is still there.
        """
        if done.reason == "error" or (done.reason == "cancelled" and not done.text):
            return False
        self.turns = [*kept, Turn(question, done.text, done.reason, done.reasoning)]
        self.pending = None
        return True

    def last_question(self) -> tuple[str, list[Turn]] | None:
        """The question that a retry asks, and the turns before it; None if nothing was asked yet."""
        if self.pending is not None:
            return self.pending
        if not self.turns:
            return None
        return self.turns[-1].question, self.turns[:-1]

    def clear(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns = []
        self.pending = None
