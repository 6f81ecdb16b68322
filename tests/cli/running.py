"""Run the command line with a scripted engine in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(folder: Path, **changes: str) -> dict[str, str]:
    """A clean environment whose state and cache folders lie in ``folder``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RUN_LOCAL_", "HF_", "XDG_"))}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder / "home"),
        "XDG_STATE_HOME": str(folder / "state"),
        "RUN_LOCAL_CACHE": str(folder / "cache"),
        **changes,
    }


def command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.cli.fake_main", script, *arguments]


def run(
    folder: Path, script: str, *arguments: str, stdin: bytes = b"", **changes: str
) -> subprocess.CompletedProcess[bytes]:
    """Run to the end, in ``folder``."""
    return subprocess.run(
        command(script, *arguments),
        cwd=folder,
        input=stdin,
        capture_output=True,
        env=environment(folder, **changes),
        timeout=120,
        check=False,
    )


def error_line(result: subprocess.CompletedProcess[bytes]) -> str:
    """The one line that begins with ``run-local: error:``; there is no traceback and no noise at exit."""
    text = result.stderr.decode()
    assert "Traceback" not in text and "Exception ignored" not in text
    lines = [line for line in text.splitlines() if line.startswith("run-local: error: ")]
    assert len(lines) == 1, text
    return lines[0].removeprefix("run-local: error: ")
