"""The smallest budget that ``plan`` names is the one that a run accepts: both measure the same process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.tiny_models import build_tiny

COMMAND = [sys.executable, str(Path(__file__).parents[2] / "run_local.py")]


def smallest(arguments: list[str], cache: Path) -> int:
    """The MiB that the refusal of a budget of 1 MiB names."""
    command = [*COMMAND, *arguments, "--ram", "1MiB", "--ctx", "128"]
    env = os.environ | {"RUN_LOCAL_CACHE": str(cache)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found = re.search(r"the smallest that works is --ram (\d+)MiB", done.stderr)
    assert done.returncode == 1 and found, done.stderr
    return int(found.group(1))


def test_plan_and_chat_name_the_same_budget(tmp_path: Path) -> None:
    model = str(build_tiny("qwen3_moe", tmp_path / "model"))
    planned = smallest(["plan", "--model", model], tmp_path)
    assert abs(planned - smallest(["chat", "hello", "--model", model], tmp_path)) <= 4
