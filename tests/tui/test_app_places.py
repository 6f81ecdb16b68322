"""Actions of the full-screen chat by command instead of key, and terminals of all sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tui.app_pilot import ask, does, enter, go, host_of, make_app, notes, running, screen_text, until
from tests.tui.fake_engine import Answer
from tui.app.screens import ListScreen


@does("/stop", "/think", "/edit", "/editor", "/new", "/drawer", "/models", "/quit")
def test_what_has_a_key_has_a_command_too(tmp_path: Path) -> None:
    async def test() -> None:
        answers = (Answer(("well", "some "), thoughts=1, waits=True), Answer())
        app = make_app(tmp_path, host_of(*answers))
        async with running(app) as pilot:
            await enter(pilot, "hi")
            await until(pilot, lambda: app.answer is not None and app.answer.text.endswith("some "))
            await enter(pilot, "/stop")
            await until(pilot, lambda: not app.busy)
            await enter(pilot, "/think")
            assert "well" in screen_text(app)
            await enter(pilot, "/edit")
            assert app.prompt.text == "hi" and not app.session.conversation.turns
            await enter(pilot, "/editor")
            assert "this terminal cannot be lent to an editor" in notes(app)
            await enter(pilot, "/drawer")
            assert app.drawer.display
            await pilot.press("f4")
            await enter(pilot, "/new")
            assert "a new conversation" in notes(app)
            await enter(pilot, "/models")
            await until(pilot, lambda: isinstance(app.screen, ListScreen))
            await pilot.press("escape")
            await enter(pilot, "/quit")
            assert app.return_value == 0

    go(test())


@pytest.mark.parametrize("size", [(40, 10), (20, 6), (3, 2)], ids=str)
def test_a_tiny_terminal_is_no_reason_to_fail(size: tuple[int, int], tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path, host_of(Answer(("| a | b |\n| - | - |\n| 1 | 2 |\n\n```\n", "x" * 90, "\n```"))))
        async with running(app) as pilot:
            await pilot.resize_terminal(*size)
            await ask(pilot, "你好 🎉 " * 9)
            for key in ("f1", "f2", "f2", "f3", "f4", "f4", "f5", "f6"):
                await pilot.press(key)
                await pilot.pause()
                if len(app.screen_stack) > 1:
                    await pilot.press("escape")
            await pilot.resize_terminal(120, 40)
            await pilot.pause()
            assert "›" in screen_text(app)

    go(test())


def test_the_panel_comes_and_goes_with_the_width(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path)
        async with running(app, (140, 50)) as pilot:
            assert app.sidebar.display and app.query_one("#map").display
            for size, panel, map in (((80, 24), False, False), ((140, 30), True, False), ((300, 90), True, True)):
                await pilot.resize_terminal(*size)
                await pilot.pause()
                assert (app.sidebar.display, app.query_one("#map").display) == (panel, map), size

    go(test())


@does("f2", "/panel")
def test_the_panel_is_shown_hidden_and_folds_away(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path)
        async with running(app, (80, 24)) as pilot:
            assert not app.sidebar.display
            assert "- tokens/s · hits - (-)" in screen_text(app)
            await pilot.press("f2")
            await pilot.pause()
            assert app.sidebar.display and "first token" in screen_text(app)
            await enter(pilot, "/panel")
            assert not app.sidebar.display
            await pilot.resize_terminal(140, 50)
            await pilot.pause()
            assert not app.sidebar.display  # it was hidden by hand
            await pilot.press("f2")
            await pilot.pause()
            assert app.sidebar.display and app.query_one("#map").display

    go(test())
