"""Actions of the full-screen chat on settings, models and conversations, and the ways to all actions."""

from __future__ import annotations

import threading
from pathlib import Path

from offload.events import LiveChanges
from tests.tui.app_pilot import ask, does, engine_of, enter, go, host_of, make_app, notes, running, screen_text, until
from tests.tui.fake_engine import Answer
from tests.tui.live_engine import FakeHost, FakeLiveEngine
from tui.actions import ACTIONS
from tui.app.drawer import Drawer
from tui.app.entries import Answer as Shown
from tui.app.prompt_box import PromptBox
from tui.app.screens import ListScreen, TextScreen


@does("/policy", "/scope", "/prefetch", "/miss", "/host-policy", "/residency", "/ram", "/vram")
def test_settings_are_changed_by_command_between_tokens(tmp_path: Path) -> None:
    async def test() -> None:
        gate = threading.Semaphore(2)
        app = make_app(tmp_path, host_of(Answer(("a ", "b ", "c ", "d")), gate=gate))
        async with running(app) as pilot:
            await enter(pilot, "/policy")
            assert "policy ewma; there are ewma, lfu, lru" in notes(app)
            await enter(pilot, "hi")
            await until(pilot, lambda: app.answer is not None and app.answer.text == "a b ")
            await enter(pilot, "/policy lru")
            gate.release(2)
            await until(pilot, lambda: not app.busy)
            await until(pilot, lambda: "policy ewma → lru" in notes(app))
            await enter(pilot, "/residency 25%")
            await enter(pilot, "/ram 1GiB")
            await enter(pilot, "/prefetch next-gate")
            await until(pilot, lambda: len(engine_of(app).changes) == 4)
            assert engine_of(app).changes == [
                LiveChanges(policy="lru"),
                LiveChanges(residency=0.25),
                LiveChanges(ram=2**30),
                LiveChanges(prefetch="next-gate"),
            ]
            assert engine_of(app).change_threads == {"engine"}
            await enter(pilot, "/policy best")
            await until(pilot, lambda: any("unknown policy 'best'; there are ewma" in note for note in notes(app)))
            await enter(pilot, "/residency lots")
            await enter(pilot, "/scope layer")
            await enter(pilot, "/miss cpu")
            await enter(pilot, "/host-policy lfu")
            await enter(pilot, "/vram 2GiB")
            await until(pilot, lambda: engine_of(app).current.vram == 2**31)
            assert engine_of(app).current.miss == "cpu"
            assert engine_of(app).current.host_policy == "lfu"
            assert any("residency: 'lots' is not a number" in note for note in notes(app))

    go(test())


@does("f4")
def test_the_drawer_changes_a_setting_and_shows_before_and_after(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path, host_of(Answer(("a ", "b ", "c"))))
        async with running(app, (160, 50)) as pilot:
            await ask(pilot, "hi")
            await pilot.press("f4")
            await pilot.pause()
            drawer = app.query_one(Drawer)
            assert drawer.display
            assert not drawer.query_one("#field-scope").display  # this engine has none
            entry = drawer.query_one("#set-policy")
            assert entry.has_focus and entry.value == "ewma"  # type: ignore[attr-defined]
            entry.value = "lfu"  # type: ignore[attr-defined]
            await pilot.press("enter")
            await until(pilot, lambda: engine_of(app).current.policy == "lfu")
            await ask(pilot, "again")
            await until(pilot, lambda: "3 tokens since" in screen_text(app))
            assert "policy ewma → lfu" in screen_text(app)
            assert screen_text(app).count("60.0 %, 10.0 tokens/s") >= 2
            await pilot.press("f4")
            assert not drawer.display

    go(test())


@does("/trace")
def test_a_part_is_recorded(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path)
        async with running(app) as pilot:
            await enter(pilot, "/trace")
            assert any("/trace needs" in note for note in notes(app))
            await enter(pilot, "/trace start")
            await until(pilot, lambda: app.tracing)
            assert "● recording" in screen_text(app)
            await enter(pilot, f"/trace stop {tmp_path}/t.npz")
            await until(pilot, lambda: not app.tracing)
            assert f"42 rows of routing in {tmp_path}/t.npz" in notes(app)
            await enter(pilot, f"/trace stop {tmp_path}/u.npz")
            await until(pilot, lambda: any("nothing is being recorded" in note for note in notes(app)))
            await enter(pilot, f"/trace stop {tmp_path}/t.npz")
            assert any("exists already" in note for note in notes(app))

    go(test())


@does("f6", "/model")
def test_models_are_listed_and_switched(tmp_path: Path) -> None:
    async def test() -> None:
        host = FakeHost({"demo": FakeLiveEngine(), "org/big": FakeLiveEngine(model_name="org/big")})
        app = make_app(tmp_path, host)
        async with running(app) as pilot:
            await ask(pilot, "hi")
            await pilot.press("f6")
            await until(pilot, lambda: isinstance(app.screen, ListScreen))
            assert "org/big" in screen_text(app) and "16.00 GiB" in screen_text(app)
            await pilot.press("b", "i", "g", "enter")
            await until(pilot, lambda: app.engine is not None and app.engine.model_name == "org/big")
            await until(pilot, lambda: len(app.screen_stack) == 1)
            assert host.engines["demo"].closed
            assert app.session.model == "org/big"
            await enter(pilot, "/model demo")
            await until(pilot, lambda: app.engine is not None and app.engine.model_name == "fake")
            assert len(app.session.conversation.turns) == 1

    go(test())


@does("ctrl+n", "f5", "/rename", "/delete", "/resume", "/conversations")
def test_conversations_are_listed_searched_resumed_renamed_and_deleted(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path)
        async with running(app) as pilot:
            await ask(pilot, "about cats")
            first = app.session.id
            await enter(pilot, "/rename my cats")
            await pilot.press("ctrl+n")
            assert app.session.conversation.turns == []
            await ask(pilot, "about dogs")
            second = app.session.id
            assert first and second and first != second
            await pilot.press("f5")
            await pilot.pause()
            assert "my cats" in screen_text(app) and "● about dogs" in screen_text(app)
            await pilot.press("c", "a", "t", "s", "enter")
            await pilot.pause()
            assert app.session.id == first and "about cats" in screen_text(app)
            await enter(pilot, f"/delete {first}")
            assert any("the conversation that you are in" in note for note in notes(app))
            await pilot.press("f5")
            await pilot.pause()
            await pilot.press("d", "o", "g", "s", "f2")
            await pilot.pause()
            for _ in "about dogs":
                await pilot.press("backspace")
            await pilot.press(*"hounds", "enter")
            await pilot.pause()
            assert "hounds" in screen_text(app)
            await pilot.press(*"hounds", "delete")
            assert "Delete again" in screen_text(app)
            await pilot.press("delete")
            await pilot.pause()
            assert "hounds" not in screen_text(app)
            await pilot.press("escape")
            await enter(pilot, f"/resume {second}")
            assert any("there is no conversation that begins" in note for note in notes(app))
            await enter(pilot, f"/conversations {first}")
            await pilot.pause()
            assert isinstance(app.screen, ListScreen)

    go(test())


@does("ctrl+p")
def test_the_palette_has_every_action_and_fills_in_what_needs_words(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path)
        async with running(app) as pilot:
            titles = {command.title.split()[0] for command in app.get_system_commands(app.screen)}
            assert titles == {a.name for a in ACTIONS if a.scope == "app"} - {"interrupt", "palette"}
            await pilot.press("ctrl+p")
            await pilot.press(*"save")
            await pilot.pause(0.3)
            await pilot.press("enter")
            await until(pilot, lambda: app.prompt.text == "/save ")
            app.from_palette("help")
            await pilot.pause()
            assert isinstance(app.screen, TextScreen)

    go(test())


def test_unknown_and_wrong_commands_are_said(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path)
        async with running(app) as pilot:
            for line, problem in (
                ("/nope", "there is no command /nope; there are /clear"),
                ("/clear all", "/clear takes nothing after it"),
                ("/save", "/save needs FILE after it"),
                ("/retry", "there is no question to ask again"),
                ("/edit", "there is no question to take back"),
            ):
                await enter(pilot, line)
                assert any(problem in note for note in notes(app)), line
                app.prompt.clear()
            await ask(pilot, "//usr is a path")
            assert app.session.conversation.turns[0].question == "/usr is a path"
            assert app.query_one(PromptBox).text == ""

    go(test())


@does("ctrl+z")
def test_suspending_is_passed_on(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path)
        done = []
        async with running(app) as pilot:
            app.action_suspend_process = lambda: done.append(True)  # type: ignore[method-assign]
            await pilot.press("ctrl+z")
        assert done == [True]

    go(test())


def test_answers_shown_twice_are_the_same_text(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path, host_of(Answer(("# Title\n\n", "- a\n", "- b\n\nend"))))
        async with running(app) as pilot:
            await ask(pilot, "hi")
            await pilot.pause(0.1)
            once = screen_text(app)
            shown = [entry for entry in app.transcript.entries if isinstance(entry, Shown)]
            assert shown[0].done and "• a" in once
            await pilot.resize_terminal(121, 40)
            await pilot.pause(0.2)
            await pilot.resize_terminal(120, 40)
            await pilot.pause(0.2)
            assert screen_text(app) == once

    go(test())
