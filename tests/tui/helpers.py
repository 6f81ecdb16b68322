"""A screen that remembers what was written, and a chat on it."""

from __future__ import annotations

import io
from collections.abc import Iterable

from offload.config import SamplingSettings
from tests.tui.fake_engine import Answer, FakeEngine
from tui.conversation import Conversation
from tui.plain import PlainChat
from tui.prompt import PromptReader
from tui.screen import Screen


class RecordedScreen(Screen):
    def __init__(self) -> None:
        self.stdout, self.stderr = io.StringIO(), io.StringIO()
        super().__init__(self.stdout, self.stderr)

    @property
    def out(self) -> str:
        return self.stdout.getvalue()

    @property
    def err(self) -> str:
        return self.stderr.getvalue()


def make_chat(
    *answers: Answer, context_tokens: int = 1000, sampling: SamplingSettings | None = None, system: str | None = None
) -> tuple[PlainChat, FakeEngine, RecordedScreen]:
    engine = FakeEngine(answers or (Answer(),), context_tokens=context_tokens)
    screen = RecordedScreen()
    return PlainChat(engine, screen, sampling or SamplingSettings(), Conversation(system)), engine, screen


def scripted_reader(screen: Screen, lines: Iterable[str | BaseException], typed: str = "") -> PromptReader:
    """Lines as if typed; an exception is raised in their place, and EOFError at the end."""
    script = iter(lines)

    def read_line(prompt: str) -> str:
        line = next(script, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return PromptReader(screen, read_line, lambda: typed)


def roles(messages: object) -> str:
    """``sua``: the first letters of the roles."""
    assert isinstance(messages, list)
    return "".join(message["role"][0] for message in messages)
