"""Completion is made from the parser; bash really completes with it."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from run_local import build_parser
from tui.completion import SHELLS, bash, read_parser

COMMANDS = read_parser(build_parser())


def test_everything_of_the_parser_is_there() -> None:
    names = {command.name for command in COMMANDS}
    assert {"", "chat", "batch", "plan", "pack", "bench", "models", "completion"} <= names
    for make in SHELLS.values():
        text = make(COMMANDS)
        for command in COMMANDS:
            assert command.name in text
            for option in command.options:
                assert option.flags[-1].lstrip("-") in text


def complete(line: str) -> set[str]:
    words = line.split(" ")
    script = bash(COMMANDS) + (
        f"COMP_WORDS=({' '.join(word or chr(39) * 2 for word in words)})\n"
        f'COMP_CWORD={len(words) - 1}\n_run_local\nprintf "%s\\n" "${{COMPREPLY[@]}}"\n'
    )
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("there is no bash on this machine")
    result = subprocess.run([shell, "-c", script], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return set(result.stdout.split())


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("run-local ", {"chat", "batch", "completion", "--version"}),
        ("run-local ch", {"chat"}),
        ("run-local chat --res", {"--resume", "--residency"}),
        ("run-local chat --format ", {"native", "int8", "int4"}),
        ("run-local chat --plain --prefetch n", {"next-gate"}),
        ("run-local completion ", {"bash", "zsh", "fish"}),
        ("run-local plan --", {"--json", "--model", "--ram"}),
    ],
)
def test_bash_completes(line: str, some: set[str]) -> None:
    assert some <= complete(line)


def test_bash_completes_nothing_of_other_commands() -> None:
    assert "--system" not in complete("run-local plan --")
    assert complete("run-local chat --temperature ") <= {""}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_it(shell: str) -> None:
    if (found := shutil.which(shell)) is None:
        pytest.skip(f"there is no {shell} on this machine")
    result = subprocess.run([found, "-n"], input=SHELLS[shell](COMMANDS), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
