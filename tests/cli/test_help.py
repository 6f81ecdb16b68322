"""Help starts at once: it imports nothing heavy, and says what it should."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import ROOT, environment

COMMANDS = ("chat", "batch", "plan", "pack", "bench", "models", "trace", "tune", "doctor", "config", "completion")
HEAVY = ("torch", "transformers", "textual", "rich", "numpy", "huggingface_hub", "tokenizers", "readline")


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=["run-local", *COMMANDS])
def test_help_imports_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    code = (
        "import sys, run_local\n"
        f"code = run_local.main({[*arguments, '--help']!r})\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
        "sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert result.returncode == 0
    assert result.stderr == "[]\n"
    assert result.stdout.startswith(" ".join(["usage: run-local", *arguments]))
    for code in ("0 ", "1 ", "2 ", "130 ", "141 "):
        assert f"\n  {code}" in result.stdout
    if not arguments:
        assert all(re.search(rf"\n    {name}\s", result.stdout) for name in COMMANDS)


def test_the_file_itself_is_a_command(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "run_local.py"), "--version"],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    assert result.stdout.startswith("run-local ")
