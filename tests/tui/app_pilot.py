"""Run the full-screen chat without a terminal, on a fake engine."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

from textual.pilot import Pilot

from offload.config import EngineSettings, SamplingSettings
from tests.tui.fake_engine import Answer
from tests.tui.live_engine import FakeHost, FakeLiveEngine
from tui.actions import ACTIONS, Action, parse_slash
from tui.app.app import ChatApp
from tui.app.entries import Note
from tui.session import Session
from tui.settings import LookSettings
from tui.store import Store

Test = TypeVar("Test", bound=Callable[..., None])


def make_app(folder: Path, host: FakeHost | None = None, **settings: Any) -> ChatApp:
    session = Session(Store(folder / "conversations"), settings.pop("sampling", SamplingSettings()))
    look = settings.pop("look", LookSettings())
    return ChatApp(
        host or FakeHost(),
        EngineSettings(**settings),
        session,
        look,
        history=folder / "messages",
        copies=folder / "copied.txt",
    )


@asynccontextmanager
async def running(app: ChatApp, size: tuple[int, int] = (120, 40), loaded: bool = True) -> AsyncIterator[Pilot[int]]:
    """The app on a screen of ``size``, its model loaded unless told otherwise; all is closed at the end."""
    try:
        async with app.run_test(size=size) as pilot:
            if loaded:
                await until(pilot, lambda: app.engine is not None and len(app.screen_stack) == 1)
            yield pilot
    finally:
        await asyncio.to_thread(app.worker.close)
        app.session.close()


async def until(pilot: Pilot[int], ready: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something that another thread brings about."""
    for _ in range(int(seconds / 0.02)):
        if ready():
            await pilot.pause()
            return
        await pilot.pause(0.02)
    raise AssertionError("it did not happen")


async def enter(pilot: Pilot[int], text: str) -> None:
    """Type a message and send it."""
    app = pilot.app
    assert isinstance(app, ChatApp)
    app.prompt.put(text)
    await pilot.press("enter")
    await pilot.pause()


async def ask(pilot: Pilot[int], text: str) -> None:
    """Send a question and wait for the end of its answer."""
    app = pilot.app
    assert isinstance(app, ChatApp)
    before = len(engine_of(app).prompts)
    await enter(pilot, text)
    await until(pilot, lambda: len(engine_of(app).prompts) > before and not app.busy)


def engine_of(app: ChatApp) -> FakeLiveEngine:
    assert isinstance(app.engine, FakeLiveEngine)
    return app.engine


TESTED: set[str] = set()
"""What :func:`does` was told, by all tests that are imported."""
_KEYS = {key: action for action in ACTIONS for key in action.keys}


def does(*ways: str) -> Callable[[Test], Test]:
    """This test does these actions of the table: keys in Textual's names, and slash commands. That it does is checked,
    and that every way to every action has a test."""
    TESTED.update(ways)

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        def checked(*arguments: Any, **named: Any) -> None:
            with recording() as done:
                test(*arguments, **named)
            assert set(ways) <= done, f"not done: {sorted(set(ways) - done)}"

        return checked

    return decorate


@contextmanager
def recording() -> Iterator[set[str]]:
    """Collects the keys that were pressed and led to their action, and the slash commands that were sent."""
    pressed: set[str] = set()
    acted: set[str] = set()
    done: set[str] = set()
    press, act = Pilot.press, ChatApp.act

    async def pressing(pilot: Pilot[int], *keys: str) -> None:
        pressed.update(keys)
        await press(pilot, *keys)

    def acting(app: ChatApp, name: str, argument: str = "") -> None:
        acted.add(name)
        act(app, name, argument)

    def parsing(line: str) -> tuple[Action, str]:
        action, argument = parse_slash(line)
        done.add(f"/{action.slash}")
        return action, argument

    with (
        patch.object(Pilot, "press", pressing),
        patch.object(ChatApp, "act", acting),
        patch("tui.app.app.parse_slash", parsing),
    ):
        yield done
    elsewhere = {"palette"}  # Textual's own
    for key in pressed & _KEYS.keys():
        action = _KEYS[key]
        if action.name in acted or action.scope == "prompt" or action.name in elsewhere:
            done.add(key)


def notes(app: ChatApp) -> list[str]:
    """What the program itself said in the chat."""
    return [entry.text for entry in app.transcript.entries if isinstance(entry, Note)]


def screen_text(app: ChatApp) -> str:
    """All that is on the screen, line by line."""
    width, height = app.size
    lines = app.screen._compositor.render_strips()
    assert len(lines) == height
    return "\n".join("".join(segment.text for segment in strip).rstrip()[:width] for strip in lines)


def go(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def host_of(*answers: Answer, **engine: Any) -> FakeHost:
    return FakeHost({"demo": FakeLiveEngine(answers or (Answer(),), **engine)})
