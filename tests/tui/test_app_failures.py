"""What goes wrong is a line with the remedy; the conversation is intact, now and after a restart."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from offload.config import EngineSettings, SamplingSettings
from offload.errors import ExpertFileError, RunLocalError
from offload.protocol import OnLoad
from tests.tui.app_pilot import ask, engine_of, enter, go, host_of, make_app, notes, running, screen_text, until
from tests.tui.fake_engine import Answer
from tests.tui.live_engine import FakeHost
from tui.app.app import ChatApp
from tui.app.load_screen import LoadScreen
from tui.app.run import ChatRequest, run_app
from tui.session import Session
from tui.settings import LookSettings
from tui.store import Store, read_saved


def saved_turns(folder: Path) -> list[str]:
    return [turn.answer for turn in read_saved(next((folder / "conversations").iterdir())).conversation.turns]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(("some",), error="model.safetensors: cannot be read; is the disk there?"), "is the disk there?"),
        (Answer(raises=ExpertFileError("experts.bin is gone; pack the model again")), "pack the model again"),
        (Answer(raises=MemoryError()), "out of memory; give a smaller --ram or --ctx"),
        (Answer(raises=BrokenPipeError(32, "Broken pipe")), "Broken pipe (details: "),
        (Answer(raises=RuntimeError("worker died")), "this is a bug (RuntimeError: worker died); please report it"),
    ],
    ids=["stream", "file", "memory", "worker", "bug"],
)
def test_a_failed_answer(answer: Answer, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    async def test() -> None:
        app = make_app(tmp_path, host_of(Answer(("good",)), answer, Answer(("again",))))
        async with running(app, (200, 40)) as pilot:
            await ask(pilot, "one")
            await ask(pilot, "two")
            await until(pilot, lambda: said in screen_text(app))
            assert [turn.answer for turn in app.session.conversation.turns] == ["good"]
            assert saved_turns(tmp_path) == ["good"]
            await enter(pilot, "/retry")
            await until(pilot, lambda: len(engine_of(app).prompts) == 3 and not app.busy)
            assert [turn.answer for turn in app.session.conversation.turns] == ["good", "again"]
        assert saved_turns(tmp_path) == ["good", "again"]

    go(test())


def test_a_prompt_too_long_drops_the_oldest_turns(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path, host_of(Answer(("w " * 30,)), context_tokens=50))
        async with running(app) as pilot:
            await ask(pilot, "a " * 10)
            await ask(pilot, "b " * 10)
            assert len(engine_of(app).prompts[-1]) == 1
            assert len(app.session.conversation.turns) == 2
            await enter(pilot, "c " * 60)
            await until(pilot, lambda: not app.busy and "does not fit the context" in screen_text(app))

    go(test())


def loading_host() -> tuple[FakeHost, threading.Event]:
    """A host that opens models when the event is set."""
    release = threading.Event()
    return FakeHost(script=lambda tell: (release.wait(20), None)[1]), release


@pytest.mark.parametrize("size", [(120, 40), (40, 10)], ids=str)
def test_what_is_typed_while_a_model_loads_is_kept(size: tuple[int, int], tmp_path: Path) -> None:
    host, release = loading_host()

    async def test() -> None:
        app = make_app(tmp_path, host)
        async with running(app, size, loaded=False) as pilot:
            await until(pilot, lambda: isinstance(app.screen, LoadScreen))
            await pilot.press(*"helo", "left", "l")
            await until(pilot, lambda: "hello" in screen_text(app))
            release.set()
            await until(pilot, lambda: app.engine is not None and len(app.screen_stack) == 1)
            await pilot.press("y")
            assert app.prompt.text == "hellyo"
            assert not engine_of(app).prompts

    go(test())


def test_what_is_sent_while_a_model_loads_is_sent_when_it_is_there(tmp_path: Path) -> None:
    host, release = loading_host()

    async def test() -> None:
        app = make_app(tmp_path, host)
        async with running(app, loaded=False) as pilot:
            await until(pilot, lambda: isinstance(app.screen, LoadScreen))
            await pilot.press(*"hi", "enter")
            await until(pilot, lambda: "sent as soon as the model is there" in screen_text(app))
            await pilot.press("!")  # changed his mind: it is to be sent again
            await until(pilot, lambda: "sent as soon" not in screen_text(app))
            await pilot.press("ctrl+j", "x", "enter")
            release.set()
            await until(pilot, lambda: app.engine is not None and bool(engine_of(app).prompts) and not app.busy)
            assert engine_of(app).prompts == [[{"role": "user", "content": "hi!\nx"}]]
            assert app.prompt.text == ""

    go(test())


def test_what_was_sent_to_a_model_that_never_came_is_in_the_prompt(tmp_path: Path) -> None:
    host, release = loading_host()

    async def test() -> None:
        app = make_app(tmp_path, host)
        async with running(app, loaded=False) as pilot:
            await until(pilot, lambda: isinstance(app.screen, LoadScreen))
            await pilot.press(*"hi", "enter", "escape")
            release.set()
            await until(pilot, lambda: len(app.screen_stack) == 1)
            assert app.prompt.text == "hi" and not app.busy
            await enter(pilot, "/model demo")
            await until(pilot, lambda: app.engine is not None and len(app.screen_stack) == 1)
            assert not engine_of(app).prompts

    go(test())


def test_loading_shows_the_plan_and_progress_and_can_be_cancelled(tmp_path: Path) -> None:
    release, waiting = threading.Event(), threading.Event()

    def script(tell: OnLoad) -> None:
        waiting.set()
        release.wait(20)

    async def test() -> None:
        app = make_app(tmp_path, FakeHost(script=script))
        async with running(app, loaded=False) as pilot:
            await until(pilot, lambda: waiting.is_set() and isinstance(app.screen, LoadScreen))
            await until(pilot, lambda: "16 expert slots" in screen_text(app) and "50 B of 100 B" in screen_text(app))
            assert "using demo" in screen_text(app)
            await pilot.press("escape")
            release.set()
            await until(pilot, lambda: len(app.screen_stack) == 1)
            assert "loading was cancelled; /models or F6 chooses a model" in notes(app)
            await enter(pilot, "hi")
            assert "no model is loaded; /models or F6 chooses one" in notes(app)
            assert app.prompt.text == "hi"
            for line in ("/policy lru", "/stats", "/plan", "/retry"):
                await enter(pilot, line)
            await enter(pilot, "/model demo")
            await until(pilot, lambda: app.engine is not None)

    go(test())


def test_a_model_that_cannot_be_loaded_leaves_the_chat(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path)
        async with running(app) as pilot:
            await ask(pilot, "one")
            await enter(pilot, "/model org/none")
            await until(pilot, lambda: "run once with the hub to download it" in screen_text(app))
            assert isinstance(app.screen, LoadScreen)
            await pilot.press("escape")
            await until(pilot, lambda: len(app.screen_stack) == 1)
            await enter(pilot, "/model demo")
            await until(pilot, lambda: app.engine is not None and len(app.screen_stack) == 1)
            await ask(pilot, "two")
            assert len(app.session.conversation.turns) == 2

    go(test())


def test_a_disk_that_is_full_is_said_once(tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "conversations").write_text("a file where the folder should be")
        app = make_app(tmp_path)
        app.session.on_problem = lambda problem: app.say(problem, "bad")
        async with running(app) as pilot:
            await ask(pilot, "one")
            await ask(pilot, "two")
            assert sum("is not saved" in note for note in notes(app)) == 1
            assert len(app.session.conversation.turns) == 2

    go(test())


def run_headless(app: ChatApp, monkeypatch: pytest.MonkeyPatch, steps: object) -> None:
    """Make ``run_app`` use ``app`` without a terminal."""
    monkeypatch.setattr("tui.app.run.ChatApp", lambda *arguments, **named: app)
    monkeypatch.setattr(app, "run", steps)


def test_what_is_written_at_the_end_fails_after_the_screen_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = FakeHost(close_error=RunLocalError("--trace-out: t.npz cannot be written (No space left on device)"))
    session = Session(Store(tmp_path), SamplingSettings())
    app = ChatApp(host, EngineSettings(), session, LookSettings())

    def run() -> int:
        app.worker.open(EngineSettings())
        while not host.opened:
            time.sleep(0.01)
        return 0

    run_headless(app, monkeypatch, run)
    with pytest.raises(RunLocalError, match=r"--trace-out: t\.npz cannot be written"):
        run_app(host, ChatRequest(EngineSettings(), SamplingSettings()))
    assert host.engines["demo"].closed


def test_a_crash_of_the_screen_comes_out_after_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host, session = FakeHost(), Session(Store(tmp_path), SamplingSettings())
    app = ChatApp(host, EngineSettings(), session, LookSettings())

    def run() -> int:
        app.crash = ValueError("a bug")
        return 1

    run_headless(app, monkeypatch, run)
    with pytest.raises(ValueError, match="a bug"):
        run_app(host, ChatRequest(EngineSettings(), SamplingSettings()))


def test_a_killed_chat_goes_on_where_it_was(tmp_path: Path) -> None:
    async def before() -> None:
        app = make_app(tmp_path, host_of(Answer(("good",)), Answer(("part of it",), waits=True)))
        async with running(app) as pilot:
            await ask(pilot, "one")
            await enter(pilot, "two")
            await until(pilot, lambda: app.answer is not None and app.answer.text == "part of it")
            app.session._flush()  # what a second of waiting does
            (tmp_path / "copy").mkdir()
            path = next((tmp_path / "conversations").iterdir())
            (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())  # as a kill would leave it

    async def after() -> None:
        session = Session(Store(tmp_path / "copy"), SamplingSettings())
        session.resume(Store(tmp_path / "copy").latest())
        app = ChatApp(FakeHost(), EngineSettings(), session)
        async with running(app) as pilot:
            await until(pilot, lambda: "part of it" in screen_text(app))
            assert "stopped" in screen_text(app)
            await ask(pilot, "three")
            assert len(app.session.conversation.turns) == 3

    go(before())
    go(after())
    lines = next((tmp_path / "copy").iterdir()).read_text().splitlines()
    assert all(json.loads(line) for line in lines)
