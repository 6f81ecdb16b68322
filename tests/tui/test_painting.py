"""What is painted: with which colours, and that sparing a repaint never leaves anything old on the screen."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.color import ColorType
from textual.pilot import Pilot

from tests.tui.app_pilot import ask, go, host_of, make_app, running, screen_text
from tests.tui.fake_engine import Answer as Scripted
from tests.tui.painting import WINDOW, Mark, compare
from tui.app.app import ChatApp
from tui.app.entries import Answer, Note
from tui.app.look import has_few_colors, theme_name
from tui.settings import LookSettings

_TEXT = "A **list**:\n\n1. red\n2. green\n\n```python\nfor x in y:\n    print(x)\n```\n\nand `code` in prose. " * 3


@pytest.mark.parametrize(
    ("setting", "environ", "name"),
    [
        ("auto", {"TERM": "xterm-256color"}, "run-local-dark"),
        ("auto", {"TERM": "linux"}, "ansi-dark"),
        ("auto", {"TERM": "xterm", "COLORTERM": "truecolor"}, "run-local-dark"),
        ("auto", {"TERM": "xterm", "COLORFGBG": "0;15"}, "ansi-light"),
        ("auto", {"TERM": "xterm-256color", "COLORFGBG": "0;default;15"}, "run-local-light"),
        ("dark", {"TERM": "linux"}, "run-local-dark"),
        ("dark", {"TERM": "xterm-256color", "NO_COLOR": "1"}, "ansi-dark"),
        ("light", {"TERM": "xterm-256color", "NO_COLOR": "1"}, "ansi-light"),
        ("ansi-light", {"TERM": "xterm-256color", "NO_COLOR": ""}, "ansi-light"),
    ],
)
def test_the_theme_fits_the_terminal(setting: str, environ: dict[str, str], name: str) -> None:
    assert theme_name(setting, environ) == name


def test_few_colors_are_what_rich_takes_for_few() -> None:
    from rich.console import Console

    for term in ("linux", "xterm", "xterm-16color", "xterm-256color", "tmux-256color", "xterm-kitty", "screen"):
        for colorterm in ("", "truecolor", "24bit", "yes"):
            environ = {"TERM": term, "COLORTERM": colorterm}
            console = Console(force_terminal=True, _environ=environ)
            assert has_few_colors(environ) == (console.color_system == "standard"), environ


def color_types(app: ChatApp) -> set[ColorType]:
    """The kinds of colours on the screen."""
    found = set()
    for strip in app.screen._compositor.render_strips():
        for segment in strip:
            for color in (segment.style.color, segment.style.bgcolor) if segment.style else ():
                if color is not None:
                    found.add(color.type)
    return found


@pytest.mark.parametrize("theme", ["ansi-dark", "ansi-light"])
def test_an_ansi_theme_uses_the_terminals_own_colours_alone(theme: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        app = make_app(tmp_path, host_of(Scripted((_TEXT,), thoughts=0)), look=LookSettings(theme))
        async with running(app, (160, 50)) as pilot:
            await ask(pilot, "hi")
            assert "hit rate" in screen_text(app)
            assert color_types(app) <= {ColorType.DEFAULT, ColorType.STANDARD}
            await pilot.press("f3", "right")
            assert "on its way" in screen_text(app) and "▀" in screen_text(app)
            kinds = color_types(app)
            assert ColorType.STANDARD in kinds and kinds <= {ColorType.DEFAULT, ColorType.STANDARD}

    go(scenario())


def test_without_colours_the_map_has_letters_and_nothing_a_colour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def scenario() -> None:
        app = make_app(tmp_path, host_of(Scripted((_TEXT,))))
        async with running(app, (160, 50)) as pilot:
            await ask(pilot, "hi")
            assert color_types(app) <= {ColorType.DEFAULT}
            await pilot.press("f3")
            assert "####xxxxoooo" in screen_text(app)
            assert color_types(app) <= {ColorType.DEFAULT}

    go(scenario())


async def agrees(app: ChatApp, pilot: Pilot[int]) -> None:
    """What is on the screen is what painting all of it anew gives."""
    await pilot.pause(0.05)
    seen = screen_text(app)
    for widget in app.screen.query("*"):
        widget.refresh()
    await pilot.pause(0.05)
    assert seen == screen_text(app)


def test_a_spared_repaint_leaves_nothing_old(tmp_path: Path) -> None:
    async def scenario() -> None:
        app = make_app(tmp_path)
        async with running(app, (100, 30)) as pilot:
            answer = Answer()
            app.transcript.add(answer)
            for start in range(0, len(_TEXT), 40):
                app.transcript.extend(answer, _TEXT[start : start + 40])
                await agrees(app, pilot)
            assert app.transcript.show_vertical_scrollbar
            for height in (12, 40, 30):
                await pilot.resize_terminal(100, height)
                app.transcript.extend(answer, "\n\nmore")
                await agrees(app, pilot)
            app.transcript.scroll_to(y=2, animate=False)
            await agrees(app, pilot)
            app.transcript.add(Note("a note"))
            await agrees(app, pilot)
            app.transcript.remove_from(0)
            await agrees(app, pilot)

    go(scenario())


def test_the_scroll_bar_hides_no_end_of_a_line(tmp_path: Path) -> None:
    async def scenario() -> None:
        app = make_app(tmp_path)
        async with running(app, (80, 24)) as pilot:
            answer = Answer()
            app.transcript.add(answer)
            for _ in range(30):
                app.transcript.extend(answer, "a line of words\n\n")
                await pilot.pause(0.01)
                widths = {line.strip.cell_length for line in answer.lines}
                assert widths == {app.transcript.scrollable_content_region.width}
            assert app.transcript.show_vertical_scrollbar

    go(scenario())


def test_a_longer_answer_is_scrolled_to_without_a_layout(tmp_path: Path) -> None:
    async def scenario() -> None:
        app = make_app(tmp_path)
        async with running(app, (100, 30)) as pilot:
            answer = Answer()
            app.transcript.add(answer)
            app.transcript.extend(answer, "a line\n\n" * 60)
            await pilot.pause(0.1)
            before = app.screen._layout_required, app.transcript.max_scroll_y
            app.transcript.extend(answer, "a line\n\n" * 10)
            assert (app.screen._layout_required, app.transcript.max_scroll_y) == (before[0], before[1] + 20)
            assert app.transcript.scroll_y == app.transcript.max_scroll_y
            await pilot.pause(0.1)
            assert app.transcript.vertical_scrollbar.window_virtual_size == app.transcript.virtual_size.height

    go(scenario())


def test_the_cost_of_painting_is_that_of_neighbouring_windows() -> None:
    marks, now, screen = [], 0.0, 0.0
    for number in range(6 * WINDOW + 1):
        painted = number // WINDOW % 2 == 0
        marks.append(Mark(now, 0.1 * number, screen))
        drift = 1 + number / 100
        now += drift * (0.11 if painted else 0.1)
        screen += 0.004 if painted else 0.0
    found = compare([marks])
    assert 0.05 < float(str(found["cost"])) < 0.15
    assert found["screen_cpu_ms_per_token"] == {"painted": 4.0, "not painted": 0.0}
    assert found["pairs"] == 5
