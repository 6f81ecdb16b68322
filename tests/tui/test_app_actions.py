"""Every action of the full-screen chat, done with its key, its slash command or both."""

from __future__ import annotations

import importlib
import json
import threading
from pathlib import Path

import pytest

from offload.config import SamplingSettings
from tests.tui.app_pilot import (
    TESTED,
    ask,
    does,
    engine_of,
    enter,
    go,
    host_of,
    make_app,
    notes,
    running,
    screen_text,
    until,
)
from tests.tui.fake_engine import Answer
from tui.actions import ACTIONS
from tui.app.handlers import HANDLERS
from tui.app.map_box import ExpertMap
from tui.app.screens import MapScreen, TextScreen
from tui.app.transcript import Transcript
from tui.settings import LookSettings
from tui.store import read_saved


def test_every_action_has_a_handler_and_every_handler_an_action() -> None:
    assert set(HANDLERS) == {action.name for action in ACTIONS if action.scope == "app"}


def test_every_way_to_every_action_has_a_test() -> None:
    for module in ("test_app_live", "test_app_places", "test_app_tune"):
        importlib.import_module(f"tests.tui.{module}")
    ways = {key for action in ACTIONS for key in action.keys} | {f"/{a.slash}" for a in ACTIONS if a.slash}
    assert ways == TESTED


@does("enter")
def test_a_question_is_answered_saved_and_counted(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path, host_of(Answer(("Hello", " there", "."))))
        async with running(app) as pilot:
            await ask(pilot, "hi")
            assert [turn.answer for turn in app.session.conversation.turns] == ["Hello there."]
            assert "Hello there." in screen_text(app)
            assert "12.3 tokens/s · first token 0.25 s · hit rate 70.0 % · 3 tokens" in screen_text(app)
            assert app.prompt.text == ""
        saved = read_saved(next((tmp_path / "conversations").iterdir()))
        assert [(turn.question, turn.answer) for turn in saved.conversation.turns] == [("hi", "Hello there.")]

    go(test())


@does("ctrl+j", "shift+enter", "up", "down")
def test_new_lines_history_and_typing_keys(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path)
        async with running(app) as pilot:
            await pilot.press("a", "ctrl+j", "b", "shift+enter", "c")
            assert app.prompt.text == "a\nb\nc"
            await pilot.press("enter")
            await until(pilot, lambda: bool(app.session.conversation.turns) and not app.busy)
            await ask(pilot, "second")
            app.prompt.put("draft")
            await pilot.press("up")
            assert app.prompt.text == "second"
            await pilot.press("up")
            assert app.prompt.text == "a\nb\nc"
            await pilot.press("down", "down")
            assert app.prompt.text == "draft"
            await pilot.press("ctrl+c")
            assert app.prompt.text == ""
        again = make_app(tmp_path)
        async with running(again) as pilot:
            await pilot.press("up")
            assert again.prompt.text == "second"

    go(test())


def test_a_burst_of_keys_keeps_its_order(tmp_path: Path) -> None:
    async def test() -> None:
        from textual.events import Key

        app = make_app(tmp_path, look=LookSettings(keys={"send": "f9", "stop": "ctrl+x"}))
        async with running(app) as pilot:
            for key in (*"hello", "f9"):  # all at once, as a terminal sends what was typed ahead
                app.post_message(Key(key, key if len(key) == 1 else None))
            await until(pilot, lambda: bool(app.session.conversation.turns))
            assert app.session.conversation.turns[0].question == "hello"
            await pilot.press("a", "enter", "b")
            assert app.prompt.text == "a\nb"  # Enter has lost its meaning

    go(test())


def test_a_long_paste_stays_one_message(tmp_path: Path) -> None:
    async def test() -> None:
        from textual.events import Paste

        app = make_app(tmp_path)
        async with running(app) as pilot:
            text = "\r".join(f"line {number}" for number in range(300))
            app.prompt.post_message(Paste(text))
            await until(pilot, lambda: "line 299" in app.prompt.text)
            assert app.prompt.size.height <= 10
            await pilot.press("enter")
            await until(pilot, lambda: bool(app.session.conversation.turns))
            assert app.session.conversation.turns[0].question.count("\n") == 299

    go(test())


@does("escape")
def test_stop_keeps_the_part_and_the_chat_goes_on(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path, host_of(Answer(("some ", "text"), waits=True), Answer(("more",))))
        async with running(app) as pilot:
            await enter(pilot, "hi")
            await until(pilot, lambda: app.answer is not None and app.answer.text == "some text")
            await enter(pilot, "too early")
            assert "an answer is on its way; Esc stops it" in notes(app)
            assert app.prompt.text == "too early"
            await pilot.press("escape")
            await until(pilot, lambda: not app.busy)
            assert [turn.finish_reason for turn in app.session.conversation.turns] == ["cancelled"]
            assert "stopped · " in screen_text(app)
            await ask(pilot, "go on")
            assert app.session.conversation.turns[-1].answer == "more"

    go(test())


def test_a_stop_that_comes_before_the_first_token_is_not_lost(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path, host_of(Answer(("text",), waits=True), gate=threading.Semaphore(0)))
        async with running(app) as pilot:
            await enter(pilot, "hi")
            await pilot.press("escape")
            await until(pilot, lambda: not app.busy)
            assert len(app.session.conversation.turns) <= 1

    go(test())


@pytest.mark.parametrize("presses", [1, 2])
@does("ctrl+c")
def test_ctrl_c_stops_and_a_second_one_leaves(presses: int, tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path, host_of(Answer(("text",), waits=True)))
        async with running(app) as pilot:
            await enter(pilot, "hi")
            await until(pilot, lambda: app.answer is not None and app.answer.text == "text")
            app.worker.stop = lambda: None if presses == 2 else type(app.worker).stop(app.worker)  # type: ignore[method-assign]
            for _ in range(presses):
                await pilot.press("ctrl+c")
            if presses == 1:
                await until(pilot, lambda: not app.busy)
                assert app.return_value is None
            else:
                assert app.return_value == 130
                del app.worker.stop

    go(test())


@does("ctrl+d", "ctrl+q")
def test_ctrl_c_on_an_empty_line_leaves_and_ctrl_d_too(tmp_path: Path) -> None:
    async def test(key: str, code: int) -> None:
        app = make_app(tmp_path)
        async with running(app) as pilot:
            await pilot.press(key)
            await pilot.pause()
            assert app.return_value == code

    for key, code in (("ctrl+d", 0), ("ctrl+q", 0)):
        go(test(key, code))


@does("ctrl+r", "/retry")
def test_retry_replaces_the_answer_and_one_that_fails_keeps_the_old(tmp_path: Path) -> None:
    async def test() -> None:
        answers = (Answer(("old",)), Answer(("ha",), error="the disk is gone; plug it in"), Answer(("new",)))
        app = make_app(tmp_path, host_of(*answers))
        async with running(app) as pilot:
            await ask(pilot, "hi")
            await pilot.press("ctrl+r")
            await until(pilot, lambda: len(engine_of(app).prompts) == 2 and not app.busy)
            assert [turn.answer for turn in app.session.conversation.turns] == ["old"]
            assert "the disk is gone; plug it in" in screen_text(app)
            await enter(pilot, "/retry")
            await until(pilot, lambda: len(engine_of(app).prompts) == 3 and not app.busy)
            assert [turn.answer for turn in app.session.conversation.turns] == ["new"]
            assert engine_of(app).prompts[0] == engine_of(app).prompts[2]

    go(test())


@does("alt+up")
def test_edit_takes_the_question_back(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path)
        async with running(app) as pilot:
            await ask(pilot, "one")
            await ask(pilot, "two")
            await pilot.press("alt+up")
            assert app.prompt.text == "two"
            assert [turn.question for turn in app.session.conversation.turns] == ["one"]
            await ask(pilot, "two, but better")
            assert [turn.question for turn in app.session.conversation.turns] == ["one", "two, but better"]
        saved = read_saved(next((tmp_path / "conversations").iterdir()))
        assert [turn.question for turn in saved.conversation.turns] == ["one", "two, but better"]

    go(test())


@does("ctrl+g")
def test_the_editor_gets_the_message_and_gives_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "edit.sh"
    script.write_text('#!/bin/sh\nprintf " and more" >> "$1"\n')
    script.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(script))

    async def test() -> None:
        from contextlib import nullcontext

        app = make_app(tmp_path)
        async with running(app) as pilot:
            app.prompt.put("a start")
            await pilot.press("ctrl+g")
            assert "this terminal cannot be lent to an editor" in notes(app)
            app.suspend = nullcontext  # type: ignore[method-assign, assignment]
            await pilot.press("ctrl+g")
            assert app.prompt.text == "a start and more"
            monkeypatch.setenv("VISUAL", "no-such-editor")
            await pilot.press("ctrl+g")
            assert any("'no-such-editor' cannot be started" in note for note in notes(app))
            assert app.prompt.text == "a start and more"

    go(test())


@does("ctrl+y", "/copy")
def test_copying_an_answer_its_code_and_all(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path, host_of(Answer(("Look:\n\n```python\nprint(1)\nprint(2)\n```\n",))))
        async with running(app) as pilot:
            await pilot.press("ctrl+y")
            assert "there is no answer to copy yet" in notes(app)
            await ask(pilot, "code?")
            copied = tmp_path / "copied.txt"
            await enter(pilot, "/copy code")
            assert app.clipboard == copied.read_text() == "print(1)\nprint(2)"
            await pilot.press("ctrl+y")
            assert copied.read_text().startswith("Look:")
            await enter(pilot, "/copy all")
            assert copied.read_text().startswith("# Conversation with fake")
            await enter(pilot, "/copy nothing")
            assert "'nothing' is not one of answer, code, all" in notes(app)
            assert copied.stat().st_mode & 0o077 == 0

    go(test())


@does("ctrl+t")
def test_a_click_on_code_copies_it_and_one_on_reasoning_unfolds_it(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path, host_of(Answer(("well, ", "well", "Here:\n\n```sh\nls", " -l\n```\n"), thoughts=2)))
        async with running(app) as pilot:
            await ask(pilot, "how?")
            await until(pilot, lambda: "ls -l" in screen_text(app))
            assert "well, well" not in screen_text(app)
            lines = screen_text(app).splitlines()
            folded = next(number for number, line in enumerate(lines) if "▸ thought, 2 words" in line)
            code = next(number for number, line in enumerate(lines) if "ls -l" in line)
            await pilot.click(Transcript, offset=(4, code - app.transcript.region.y))
            assert app.clipboard == "ls -l"
            await pilot.click(Transcript, offset=(4, folded - app.transcript.region.y))
            assert "well, well" in screen_text(app)
            await pilot.press("ctrl+t")
            assert "well, well" not in screen_text(app)
            await pilot.press("ctrl+y")
            assert app.clipboard.startswith("Here:")

    go(test())


@does("/system", "/set", "/clear")
def test_system_prompt_and_sampling(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path, sampling=SamplingSettings(seed=5))
        async with running(app) as pilot:
            for line in ("/system", "/system be brief", "/set temperature 0.5", "/set top-k 7", "/set seed -"):
                await enter(pilot, line)
            await enter(pilot, "/set colour 3")
            assert any("write /set NAME VALUE" in note for note in notes(app))
            await enter(pilot, "/set temperature -1")
            assert any("--temperature must be 0" in note for note in notes(app))
            await ask(pilot, "hi")
            assert engine_of(app).samplings[-1] == SamplingSettings(temperature=0.5, top_k=7)
            assert engine_of(app).prompts[-1][0] == {"role": "system", "content": "be brief"}
            await enter(pilot, "/system -")
            assert app.session.conversation.system is None
            await enter(pilot, "/clear")
            assert app.session.conversation.turns == []

    go(test())


@does("/save")
def test_save_as_markdown_and_json(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path)
        async with running(app) as pilot:
            await enter(pilot, f"/save {tmp_path}/chat.md")
            assert "there is nothing to save yet" in notes(app)
            await ask(pilot, "hi")
            await enter(pilot, f"/save {tmp_path}/chat.md")
            await enter(pilot, f"/save {tmp_path}/chat.json")
            assert "## Question\n\nhi" in (tmp_path / "chat.md").read_text()
            assert json.loads((tmp_path / "chat.json").read_text())["messages"][0]["content"] == "hi"

    go(test())


@does("f1", "/help", "/stats", "/plan", "f3", "/map")
def test_help_statistics_plan_and_map_open_and_close(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path)
        async with running(app, (100, 60)) as pilot:
            for key, line, kind, words in (
                ("f1", "/help", TextScreen, "Ctrl+R"),
                (None, "/stats", TextScreen, "decode tokens"),
                (None, "/plan", TextScreen, "16 expert slots"),
                ("f3", "/map", MapScreen, "4 layers x 8 experts"),
            ):
                for way in filter(None, (key, line)):
                    if way.startswith("/"):
                        await enter(pilot, way)
                    else:
                        await pilot.press(way)
                    await pilot.pause()
                    assert isinstance(app.screen, kind)
                    await until(pilot, lambda words=words: words in screen_text(app).replace("_", " "))
                    await pilot.press("escape")
                    await pilot.pause()
                    assert len(app.screen_stack) == 1

    go(test())


def test_the_map_says_what_is_under_the_cursor(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path)
        async with running(app) as pilot:
            await pilot.press("f3")
            await pilot.pause()
            large = app.screen.query_one(ExpertMap)
            await pilot.press("right")
            assert large.details == "layer 0 expert 0 · in RAM · score - · used now · 5 hits, 0 misses"
            await pilot.press("right")
            assert large.details == "layer 0 expert 1 · on disk · score 1 · used now · 0 hits, 2 misses"
            await pilot.press("down", "right")
            assert large.details == "layer 1 expert 2 · on disk · score 12 · never used · 0 hits, 0 misses"
            await pilot.hover(ExpertMap, offset=(0, 0))
            assert large.cursor == (0, 0)

    go(test())


@does("/theme")
def test_themes(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path)
        async with running(app) as pilot:
            await ask(pilot, "hi")
            for name in ("light", "ansi-dark", "ansi-light", "dark"):
                await enter(pilot, f"/theme {name}")
                await pilot.pause()
                assert app.current_theme.dark == ("dark" in name)
                assert "fine." in screen_text(app)
            await enter(pilot, "/theme pink")
            assert any("there is no theme 'pink'" in note for note in notes(app))
            await enter(pilot, "/theme")
            assert any("there are auto, dark" in note for note in notes(app))

    go(test())


@does("pageup", "pagedown", "ctrl+home", "ctrl+end")
def test_scrolling_up_stays_and_the_end_follows_again(tmp_path: Path) -> None:
    async def test() -> None:
        gate = threading.Semaphore(0)
        answer = Answer([f"line {number}\n\n" for number in range(120)])
        app = make_app(tmp_path, host_of(answer, gate=gate))
        async with running(app, (80, 24)) as pilot:
            await enter(pilot, "count")
            gate.release(60)
            await until(pilot, lambda: app.answer is not None and "line 59" in app.answer.text)
            await until(pilot, lambda: "line 59" in screen_text(app))
            await pilot.press("pageup")
            await pilot.pause()
            assert not app.transcript.following
            where = app.transcript.scroll_offset.y
            gate.release(20)
            await until(pilot, lambda: app.answer is not None and "line 79" in app.answer.text)
            await pilot.pause(0.2)
            assert app.transcript.scroll_offset.y == where and "line 79" not in screen_text(app)
            await pilot.press("ctrl+home")
            assert app.transcript.scroll_offset.y == 0
            await pilot.press("ctrl+end")
            assert "line 79" in screen_text(app)
            gate.release(40)
            await until(pilot, lambda: not app.busy)
            await until(pilot, lambda: "line 119" in screen_text(app))
            await pilot.press("pageup", "pagedown")
            assert app.transcript.following

    go(test())
