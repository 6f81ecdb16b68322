"""Every command of the chat, wrong ones included: they say a line and never end the chat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tui.fake_engine import Answer
from tests.tui.helpers import make_chat, roles, scripted_reader
from tui.commands import COMMANDS, help_text, run_command


def test_help_names_every_command_and_key() -> None:
    chat, _, screen = make_chat()
    run_command(chat, "/help")
    for command in COMMANDS:
        assert f"  {command.name}" in screen.err
    assert "Ctrl-C" in screen.err and "//text" in screen.err and '"""' in screen.err
    assert screen.out == ""


@pytest.mark.parametrize("line", ["/nope", "/", "/HELP", "/usr/bin/env"])
def test_an_unknown_command_says_which_there_are(line: str) -> None:
    chat, engine, screen = make_chat()
    run_command(chat, line)
    assert f"there is no command {line}; there are /help /system /clear /retry /save /quit" in screen.err
    assert engine.prompts == []


@pytest.mark.parametrize("line", ["/clear all", "/retry now", "/quit please", "/help me"])
def test_commands_without_arguments_refuse_one(line: str) -> None:
    chat, _, screen = make_chat()
    run_command(chat, line)
    assert "takes nothing after it" in screen.err
    assert not chat.leaving


def test_quit_leaves() -> None:
    chat, engine, screen = make_chat()
    assert chat.talk(scripted_reader(screen, ["/quit", "never"])) == 0
    assert engine.prompts == []


def test_system_is_shown_set_midway_and_removed() -> None:
    chat, engine, screen = make_chat()
    lines = ["/system", "one", "/system be brief", "two", "/system", "/system -", "three"]
    chat.talk(scripted_reader(screen, lines))
    assert [roles(prompt) for prompt in engine.prompts] == ["u", "suau", "uauau"]
    assert "system prompt: be brief\n" in screen.err
    assert screen.err.count("no system prompt\n") == 2


def test_a_system_prompt_of_several_lines() -> None:
    chat, _, screen = make_chat()
    chat.talk(scripted_reader(screen, ["/system be brief\\", "and kind"]))
    assert chat.conversation.system == "be brief\nand kind"


def test_clear_forgets_all_but_the_system_prompt() -> None:
    chat, engine, screen = make_chat(system="be brief")
    chat.talk(scripted_reader(screen, ["one", "/clear", "/retry", "two"]))
    assert "there is no question to ask again" in screen.err
    assert [roles(prompt) for prompt in engine.prompts] == ["su", "su"]


def test_retry_replaces_the_answer() -> None:
    chat, engine, screen = make_chat(Answer(("old",)), Answer(("new",)))
    chat.talk(scripted_reader(screen, ["one", "/retry"]))
    assert engine.prompts[0] == engine.prompts[1]
    assert [turn.answer for turn in chat.conversation.turns] == ["new"]


def test_a_retry_that_fails_keeps_the_old_answer_and_can_be_tried_again() -> None:
    chat, engine, screen = make_chat(Answer(("old",)), Answer(("ha",), error="disk"), Answer(("new",)))
    chat.talk(scripted_reader(screen, ["one", "/retry"]))
    assert [turn.answer for turn in chat.conversation.turns] == ["old"]
    chat.talk(scripted_reader(screen, ["/retry"]))
    assert engine.prompts[2] == engine.prompts[0]
    assert [turn.answer for turn in chat.conversation.turns] == ["new"]


def test_retry_without_a_question() -> None:
    chat, _, screen = make_chat()
    run_command(chat, "/retry")
    assert "there is no question to ask again" in screen.err


def test_save_json_can_be_a_batch_row(tmp_path: Path) -> None:
    chat, _, screen = make_chat(Answer(("caf\u00e9",)), system="be brief")
    chat.ask("one")
    run_command(chat, f"/save {tmp_path}/a chat.json")
    saved = json.loads((tmp_path / "a chat.json").read_text("utf-8"))
    assert saved == {"model": "fake", "messages": chat.conversation.messages(), "finish_reasons": ["stop"]}
    assert "saved to" in screen.err


def test_save_markdown(tmp_path: Path) -> None:
    chat, _, _ = make_chat(Answer(("first",)), system="be brief")
    chat.ask("one")
    run_command(chat, f"/save {tmp_path}/chat.md")
    assert (tmp_path / "chat.md").read_text("utf-8") == (
        "# Conversation with fake\n\n## System\n\nbe brief\n\n## Question\n\none\n\n## Answer\n\nfirst\n"
    )


def test_save_problems_are_one_line_and_lose_nothing(tmp_path: Path) -> None:
    chat, _, screen = make_chat()
    run_command(chat, f"/save {tmp_path}/chat.md")
    assert "there is nothing to save yet" in screen.err
    chat.ask("one")
    (tmp_path / "old.md").write_text("precious")
    for name, problem in {
        "": "/save needs a file name",
        str(tmp_path / "old.md"): "exists already; choose another name",
        str(tmp_path / "chat.txt"): "the name must end in .md or .json",
        str(tmp_path / "no" / "chat.md"): "cannot be created (No such file or directory)",
        str(tmp_path / "a\0b.md"): "cannot be created",
    }.items():
        before = screen.err
        run_command(chat, f"/save {name}")
        said = screen.err.removeprefix(before)
        assert problem in said
        assert said.count("\n") == 1
    assert (tmp_path / "old.md").read_text() == "precious"
    assert len(chat.conversation.turns) == 1


def test_save_on_a_full_disk_leaves_no_torn_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _, screen = make_chat()
    chat.ask("one")

    class FullDisk:
        def __init__(self, *args: object, **kwargs: object) -> None:
            (tmp_path / "chat.md").write_text("half")

        def __enter__(self) -> FullDisk:
            return self

        def __exit__(self, *error: object) -> None:
            raise OSError(28, "No space left on device")

        def write(self, text: str) -> None:
            pass

    monkeypatch.setattr("builtins.open", FullDisk)
    run_command(chat, f"/save {tmp_path}/chat.md")
    monkeypatch.undo()
    assert "cannot be written (No space left on device)" in screen.err
    assert not (tmp_path / "chat.md").exists()


def test_help_text_has_no_trailing_blanks() -> None:
    assert all(line == line.rstrip() for line in help_text().splitlines())
