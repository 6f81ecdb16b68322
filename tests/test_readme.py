"""The README's commands work as they stand."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from run_local import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
OWN_MODEL = [line for line in LINES if "run-local" in line and "--model Qwen" in line and not line.startswith("make")]
DEMO = [line for line in LINES if "run-local" in line and line not in OWN_MODEL and not line.startswith("make")]
PROMPTS = re.search(r"```json\n(.*?)```", README, re.S)


def test_the_readme_begins_with_the_two_commands() -> None:
    assert LINES[:2] == ["make chat", "make test"]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_make_targets_and_variables_exist(line: str) -> None:
    _, target, *variables = shlex.split(line)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.M)
    for variable in variables:
        assert re.search(rf"^{variable.split('=')[0]} \?=", makefile, re.M)


@pytest.mark.parametrize("line", OWN_MODEL)
def test_commands_for_a_model_of_ones_own_are_well_formed(line: str) -> None:
    build_parser().parse_args(shlex.split(line)[1:])


@pytest.mark.demo
@pytest.mark.parametrize("line", DEMO)
def test_commands_run(line: str, demo_model_dir: Path, tmp_path: Path) -> None:
    assert PROMPTS is not None
    (tmp_path / "prompts.jsonl").write_text(PROMPTS.group(1), encoding="utf-8")
    command = line.replace("run-local", f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'run_local.py'))}")
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    if "chat" in line and "France" in line:
        assert "Paris" in done.stdout
    elif " batch " in line:
        rows = [json.loads(row) for row in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
        assert sorted((row["id"], row["error"]) for row in rows) == [("sea", None), ("story", None)]
        assert all(row["text"] for row in rows)
    else:
        assert done.stdout.strip()
