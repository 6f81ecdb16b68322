"""A conversation together with its file: what the full-screen chat keeps of a talk, without anything of a screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from offload.config import SamplingSettings
from offload.errors import RunLocalError, UsageError
from offload.events import Done
from tui.asking import nth_sampling
from tui.conversation import Conversation, Turn
from tui.store import Saved, Store, Writer, read_saved, thought

_PART_SECONDS = 1.0
"""How much of an answer a crash can lose."""


class Session:
    """One talk at a time. A file that cannot be written ends the saving, not the talk: ``on_problem`` is told once."""

    def __init__(
        self,
        store: Store | None,
        sampling: SamplingSettings,
        system: str | None = None,
        on_problem: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.sampling = sampling
        self.conversation = Conversation(system)
        self.model = ""
        self.title = ""
        self.on_problem = on_problem
        self._clock = clock
        self._writer: Writer | None = None
        self._broken = False
        self._asked = 0
        self._parts: list[str] = []
        self._thoughts: list[str] = []
        self._written_at = 0.0
        self._base: Sequence[Turn] = ()
        self._forgotten = 0  # oldest turns that do not fit the context any more
        self._question = ""

    @property
    def id(self) -> str | None:
        """Of the file; None while there is none."""
        return self._writer.id if self._writer else None

    def ask(self, question: str, base: Sequence[Turn] | None = None) -> tuple[Sequence[Turn], SamplingSettings]:
        """A question is asked after ``base`` (default: all turns).

        Returns the turns to base the answer on, without those that :meth:`forget` is about, and the sampling.
        """
        talk = self.conversation
        self._base = list(talk.turns if base is None else base)
        self._question, self._parts, self._thoughts = question, [], []
        talk.pending = (question, list(self._base))
        if self._writer is None and not self._broken and self.store is not None:
            try:
                self._writer = self.store.create(self.model, talk.system)
                for turn in talk.turns:  # a talk that began where nothing could be written
                    self._writer.write("ask", kept=10**6, text=turn.question)
                    self._writer.write("end", text=turn.answer, reason=turn.finish_reason, **thought(turn.reasoning))
                if self.title:
                    self._writer.write("title", text=self.title)
            except RunLocalError as error:
                self._give_up(error)
        self._write("ask", sync=True, kept=len(self._base), text=question)
        self._written_at = self._clock()
        sampling = nth_sampling(self.sampling, self._asked)
        self._asked += 1
        return self._base[min(self._forgotten, len(self._base)) :], sampling

    def forget(self, turns: int) -> None:
        """So many more of the oldest turns do not fit the context: they stay on screen and file, not in the prompt."""
        self._forgotten += turns

    def part(self, text: str, reasoning: str = "") -> None:
        """Some of the answer came."""
        self._parts.append(text)
        self._thoughts.append(reasoning)
        if self._clock() - self._written_at >= _PART_SECONDS:
            self._flush()

    def end(self, done: Done, kept: Sequence[Turn] | None = None) -> bool:
        """The answer is over; it follows ``kept`` (default: all turns it was asked after).

        Returns whether it became a turn.
        """
        became_turn = self.conversation.commit(self._base if kept is None else kept, self._question, done)
        self._parts, self._thoughts = [], []
        reason = done.reason if became_turn else None
        self._write("end", sync=True, text=done.text, reason=reason, **thought(done.reasoning))
        return became_turn

    def fail(self) -> None:
        """The answer ended without a Done: what came of it stays in the file, the turns are as before."""
        self._flush()
        self._write("end", text=None, reason=None)

    def set_system(self, text: str | None) -> None:
        self.conversation.system = text
        self._write("system", text=text)

    def set_model(self, name: str) -> None:
        if name != self.model:
            self.model = name
            self._write("model", name=name)

    def set_title(self, title: str) -> None:
        self.title = title
        self._write("title", text=title)

    def clear(self) -> None:
        """Forget all turns, in the file too; the system prompt stays."""
        self.conversation.clear()
        self._forgotten = 0
        self._write("cut", kept=0)

    def cut_last(self) -> str:
        """Take the last question back and give up its answer; returns the question. Raises UsageError without one."""
        last = self.conversation.last_question()
        if last is None:
            raise UsageError("there is no question to take back")
        question, base = last
        self.conversation.turns, self.conversation.pending = list(base), None
        self._write("cut", kept=len(base))
        return question

    def new(self) -> None:
        """Leave this talk and begin another; the system prompt stays."""
        system = self.conversation.system
        self.close()
        self.conversation, self.title, self._broken = Conversation(system), "", False
        self._forgotten = 0

    def resume(self, path: Path) -> Saved:
        """Go on with a saved conversation. Raises RunLocalError if it cannot be read or is open elsewhere."""
        if self._writer is not None and self._writer.path == path:
            raise UsageError("this is the conversation that you are in")
        writer = Writer(path)
        try:
            saved = read_saved(path)
        except BaseException:
            writer.close()
            raise
        self.close()
        self._writer, self._broken, self._forgotten = writer, False, 0
        self.conversation, self.title = saved.conversation, saved.title
        if self.model and saved.model != self.model:
            self._write("model", name=self.model)
        return saved

    def close(self) -> None:
        """Safe to call twice."""
        if self._writer is not None:
            self._flush()
            self._writer.close()
            self._writer = None

    def _flush(self) -> None:
        text, self._parts = "".join(self._parts), []
        reasoning, self._thoughts = "".join(self._thoughts), []
        self._written_at = self._clock()
        if text or reasoning:
            self._write("part", text=text, **thought(reasoning))

    def _write(self, type: str, *, sync: bool = False, **values: object) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write(type, sync=sync, **values)
        except RunLocalError as error:
            self._give_up(error)

    def _give_up(self, error: RunLocalError) -> None:
        self._broken = True
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self.on_problem(f"{error}; from here on this conversation is not saved (/save FILE still writes it)")
