"""The table of actions is the only place that knows keys and commands: all else follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload.errors import UsageError
from tui.actions import ACTIONS, BY_SLASH, key_name, markdown, parse_slash
from tui.commands import COMMANDS
from tui.settings import LookSettings, config_file, read_look

MANUAL = (Path(__file__).parents[2] / "docs" / "chat.md").read_text("utf-8")


def test_the_manual_has_the_table() -> None:
    begin, end = "tests/tui/test_actions.py -->\n", "\n<!-- end of actions -->"
    assert MANUAL[MANUAL.index(begin) + len(begin) : MANUAL.index(end)] == markdown().rstrip()


def test_no_key_and_no_name_means_two_things() -> None:
    for names in ([action.name for action in ACTIONS], [a.slash for a in ACTIONS if a.slash]):
        assert len(names) == len(set(names))
    keys = [key for action in ACTIONS for key in action.keys]
    assert len(keys) == len(set(keys))


def test_every_action_can_be_reached() -> None:
    assert all(action.keys or action.slash for action in ACTIONS)
    assert all(action.help and action.help[0].islower() and "." not in action.help[-1] for action in ACTIONS)


def test_the_plain_console_has_the_same_words() -> None:
    for command in COMMANDS:
        action = BY_SLASH[command.name[1:]]
        assert (command.argument, command.help) == (action.argument, action.help)


def test_slash_lines() -> None:
    action, argument = parse_slash("/save  a file.md ")
    assert (action.name, argument) == ("save", "a file.md")
    for line, problem in (("/", "there is no command /"), ("/stop it", "takes nothing"), ("/model", "needs NAME")):
        with pytest.raises(UsageError, match=problem):
            parse_slash(line)
    assert key_name("ctrl+home") == "Ctrl+Home" and key_name("pageup") == "PgUp"


def read(tmp_path: Path, text: str) -> LookSettings:
    file = tmp_path / "config.toml"
    file.write_text(text)
    return read_look(file)


def test_settings_of_the_looks_and_keys(tmp_path: Path) -> None:
    assert read_look(None) == read_look(tmp_path / "none.toml") == read(tmp_path, "[other]\nx = 1\n") == LookSettings()
    look = read(tmp_path, '[tui]\ntheme = "light"\npanel = false\n[keys]\nstop = "Ctrl+X"\nretry = ["f9", "ctrl+r"]\n')
    assert look == LookSettings("light", False, True, {"stop": "ctrl+x", "retry": "f9,ctrl+r"})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[tui\n", "cannot be read"),
        ("tui = 3\n", r"\[tui\] must be a table"),
        ('[tui]\ncolour = "red"\n', "has no 'colour'"),
        ('[tui]\ntheme = "pink"\n', "'pink' is not one of auto"),
        ("[tui]\nmap = 3\n", "map must be true or false"),
        ('[keys]\njump = "f9"\n', "there is no action 'jump'"),
        ("[keys]\nstop = 3\n", "stop must be a key"),
        ('[keys]\nstop = "ctrl+r"\n', "ctrl.r would mean both stop and retry"),
    ],
)
def test_bad_settings_name_the_file_and_the_entry(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path / "config.toml"))


def test_the_file_follows_the_xdg_rules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert config_file() == tmp_path / "run-local" / "config.toml"
