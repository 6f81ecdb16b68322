"""Kills and interrupts of a real batch with many rows in flight, in processes of their own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import environment
from tests.tiny_models import build_tiny

ROWS, AT_ONCE, HIT = 24, 6, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model, an input, and what comes out of it undisturbed."""
    made = tmp_path_factory.mktemp("signals")
    build_tiny("olmoe", made / "model")
    rows = [
        {"id": number, "prompt": f"{number} " + "the slot " * (number % 5), "max_new_tokens": 4 + number * 7 % 9}
        for number in range(ROWS)
    ]
    (made / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert batch(made, "whole.jsonl").returncode == 0
    return made


def batch(
    folder: Path, output: str, *flags: str, main: tuple[str, ...] = ("run_local",)
) -> subprocess.CompletedProcess[bytes]:
    shared = ["--model", str(folder / "model"), "--ctx", "128", "--batch-size", str(AT_ONCE), "--temperature", "0"]
    command = [sys.executable, "-m", *main, "batch", "in.jsonl", "-o", output, *shared, "--residency", "0.4", *flags]
    return subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, timeout=300, stdin=subprocess.DEVNULL
    )


def texts(folder: Path, output: str) -> list[tuple[int, str]]:
    lines = (folder / output).read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") for line in lines)
    return [(row["id"], row["text"]) for row in map(json.loads, lines)]


def test_a_kill_in_the_middle_of_a_row_loses_those_in_flight_and_no_other(folder: Path) -> None:
    killed = batch(folder, "killed.jsonl", main=("tests.cli.batch_main", "kill", str(HIT)))
    assert killed.returncode == -signal.SIGKILL
    torn = (folder / "killed.jsonl").read_bytes()
    assert torn.count(b"\n") == HIT - 1 and not torn.endswith(b"\n"), "it was hit half-way through a row"
    resumed = batch(folder, "killed.jsonl", "--resume")
    assert resumed.returncode == 0, resumed.stderr.decode()
    assert f"{HIT - 1} rows were done before" in resumed.stderr.decode()
    assert (folder / "killed.jsonl").read_bytes().startswith(torn[: torn.rindex(b"\n") + 1])
    found = sorted(texts(folder, "killed.jsonl"))
    assert found == sorted(texts(folder, "whole.jsonl")), "each row once, whole, and as it is undisturbed"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["interrupt", "interrupt-twice"])
def test_ctrl_c_finishes_what_is_in_flight_and_twice_drops_it(folder: Path, how: str) -> None:
    output = f"{how}.jsonl"
    stopped = batch(folder, output, main=("tests.cli.batch_main", how, str(HIT)))
    assert stopped.returncode == 130, stopped.stderr.decode()
    assert b"go on with the same command and --resume" in stopped.stderr
    found = texts(folder, output)
    assert HIT + (how == "interrupt") <= len(found) < HIT + AT_ONCE, "all that had begun, and no other"
    assert batch(folder, output, "--resume").returncode == 0
    assert sorted(texts(folder, output)) == sorted(texts(folder, "whole.jsonl"))
