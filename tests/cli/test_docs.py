"""The manual names everything that the command line has."""

from __future__ import annotations

import argparse
import json

import pytest

from offload.config import SamplingSettings
from run_local import build_parser
from tests.cli.running import ROOT
from tui.commands import COMMANDS
from tui.failures import ExitCode

MANUAL = (ROOT / "docs" / "command-line.md").read_text("utf-8")


def _parsers() -> dict[str, argparse.ArgumentParser]:
    parser = build_parser()
    found = {"run-local": parser}
    for name, command in _below(parser).items():
        found[name] = command
        found |= {f"{name} {below}": one for below, one in _below(command).items()}
    return found


def _below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


NESTED = [f"trace {name}" for name in ("info", "convert", "merge", "split", "synth")] + ["config show"]
COMMAND_NAMES = ("chat", "batch", "plan", "pack", "bench", "models", "trace", "tune", "doctor", "config", "completion")
NAMES = ["run-local", *COMMAND_NAMES, *NESTED]


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_and_command_is_in_the_manual(name: str) -> None:
    parsers = _parsers()
    if name != "run-local":
        heading = f"\n### {name}\n" if " " in name else f"\n## {name}\n"
        assert heading in MANUAL
    for action in parsers[name]._actions:
        for flag in action.option_strings:
            if flag != "--help":
                assert f"`{flag}" in MANUAL or f" {flag}" in MANUAL, flag


def test_no_command_is_missing_here() -> None:
    assert set(_parsers()) == set(NAMES)


def test_exit_codes_chat_commands_and_row_fields() -> None:
    for code in ExitCode:
        assert f"\n| {code.value} |" in MANUAL
    for command in COMMANDS:
        assert f"\n| `{command.name} {command.argument}".rstrip() in MANUAL
    for field in SamplingSettings.field_names():
        assert f"`{field}`" in MANUAL


def test_the_rows_shown_are_rows() -> None:
    rows = [json.loads(line) for line in MANUAL.splitlines() if line.startswith('{"id"')]
    assert len(rows) == 3
