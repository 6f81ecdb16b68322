"""The plain chat: on a terminal or through pipes, without taking the screen over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from offload.config import SamplingSettings
from offload.errors import RunLocalError
from offload.events import Done, Event, Notice, PrefillProgress, Token
from offload.protocol import ChatEngine
from tui.asking import how_stopped, nth_sampling, start_answer, why_cut
from tui.commands import run_command
from tui.conversation import Conversation, Turn
from tui.failures import ExitCode
from tui.interrupts import CancelOnInterrupt
from tui.progress import PrefillReporter
from tui.prompt import Entry, PromptReader
from tui.screen import Screen
from tui.session import Session
from tui.status import status_line


class PlainChat:
    """One conversation with an engine. Answers go to stdout, everything else to stderr."""

    def __init__(
        self,
        engine: ChatEngine,
        screen: Screen,
        sampling: SamplingSettings,
        conversation: Conversation | None = None,
        session: Session | None = None,
    ) -> None:
        """``session``, with the conversation in it, may be saved; ``conversation`` alone is not."""
        self.engine = engine
        self.screen = screen
        self.session = session or Session(None, sampling)
        if conversation is not None:
            self.session.conversation = conversation
        self.leaving = False
        self._sampling = sampling
        self._asked = 0

    @property
    def conversation(self) -> Conversation:
        return self.session.conversation

    def answer_once(self, question: str) -> ExitCode:
        """Answer one question. Raises RunLocalError if it cannot be asked at all."""
        done = self.ask(question)
        if done.reason == "error":
            return ExitCode.FAILED
        return ExitCode.INTERRUPTED if done.reason == "cancelled" else ExitCode.DONE

    def talk(self, reader: PromptReader) -> ExitCode:
        """Answer until the user leaves; errors are said and the chat goes on."""
        self.screen.note(f"chat with {self.engine.model_name}; /help lists the commands, Ctrl-D leaves", "dim")
        while not self.leaving:
            try:
                entry = reader.read()
            except EOFError:
                break
            except KeyboardInterrupt:
                return ExitCode.INTERRUPTED
            self._take(entry)
        return ExitCode.DONE

    def ask(self, question: str, turns: Sequence[Turn] | None = None) -> Done:
        """Ask ``question`` after ``turns`` (default: all so far), show the answer, keep it in the conversation.

        Drops the oldest turns while the prompt does not fit the context. Raises ContextError if the question alone
        does not fit, RunLocalError if it cannot be asked, KeyboardInterrupt at the second Ctrl-C.
        """
        base = list(self.conversation.turns if turns is None else turns)
        self.session.ask(question, base)
        with CancelOnInterrupt(self.engine) as interrupts:
            try:
                kept, events = self._start(question, base)
                done = self._show(events, interrupts)
            finally:
                self.screen.end_answer()
        became_turn = self.session.end(done, kept)
        self._tell_end(done, became_turn)
        return done

    def _take(self, entry: Entry) -> None:
        text = entry.text
        if not entry.verbatim and text.startswith("/"):
            if not text.startswith("//"):
                run_command(self, text)
                return
            text = text[1:]
        try:
            self.ask(text)
        except RunLocalError as error:
            self.screen.problem(str(error))

    def _start(self, question: str, base: Sequence[Turn]) -> tuple[Sequence[Turn], Iterator[Event]]:
        sampling = nth_sampling(self._sampling, self._asked)
        self._asked += 1
        started = start_answer(self.engine, self.conversation, base, question, sampling)
        if told := started.tell_dropped():
            self.screen.note(told)
        return started.kept, started.events

    def _show(self, events: Iterator[Event], interrupts: CancelOnInterrupt) -> Done:
        shown = ""
        with PrefillReporter(self.screen) as prefill:
            for event in events:
                if isinstance(event, PrefillProgress):
                    prefill(event)
                elif isinstance(event, Token):
                    prefill.close()
                    self.screen.thought(event.reasoning)
                    self.screen.answer(event.text)
                    shown += event.text
                elif isinstance(event, Notice):
                    self.screen.note(event.text)
                else:
                    prefill.close()
                    if event.text.startswith(shown):  # what was held back for a stop string that never came
                        self.screen.answer(event.text[len(shown) :])
                    return event
                interrupts.insist()
        raise RuntimeError("the engine ended an answer without a Done event")

    def _tell_end(self, done: Done, became_turn: bool) -> None:
        if done.reason == "error":
            self.screen.problem(done.error or "the generation failed")
        elif done.reason == "cancelled":
            self.screen.note(how_stopped(done, became_turn))
        elif done.reason == "length":
            self.screen.note(f"cut off: {why_cut(done, self._sampling)}")
        self.screen.status(status_line(done, self.engine))
