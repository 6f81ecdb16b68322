"""``run-local batch`` in real processes: files, resume, Ctrl-C and what is refused before a model is loaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.running import command, environment, error_line, run

ROWS = '{"id": 1, "prompt": "x"}\nnonsense\n{"id": 3, "prompt": "y"}\n'
BATCH = ("batch", "in.jsonl", "-o", "out.jsonl")


@pytest.fixture(autouse=True)
def rows(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(ROWS)


def ids(tmp_path: Path) -> list[object]:
    return [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_a_batch(tmp_path: Path) -> None:
    result = run(tmp_path, "good", *BATCH, "--stats-json", "s.json")
    assert (result.returncode, result.stdout) == (0, b"")
    assert ids(tmp_path) == [1, "line-2", 3]
    assert result.stderr.endswith(b"3 rows written, 1 of them with an error, 6 new tokens\n")
    assert json.loads((tmp_path / "s.json").read_text())["new_tokens"] == 6


def test_a_batch_without_one_good_row_failed(tmp_path: Path) -> None:
    result = run(tmp_path, "fails", *BATCH)
    assert result.returncode == 1
    assert ids(tmp_path) == [1, "line-2", 3]


def test_resume(tmp_path: Path) -> None:
    run(tmp_path, "good", *BATCH, "--seed", "4")
    out = tmp_path / "out.jsonl"
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) - 20])
    result = run(tmp_path, "good", *BATCH)
    assert (result.returncode, error_line(result)) == (
        2,
        "out.jsonl: exists already; add --resume to go on with it, or remove it",
    )
    result = run(tmp_path, "good", *BATCH, "--resume")  # the seed is that of the first run
    assert result.returncode == 0
    assert out.read_bytes() == whole
    result = run(tmp_path, "good", *BATCH, "--resume", "--seed", "5")
    assert result.returncode == 2
    assert "seed was 4 and is 5" in error_line(result)
    result = run(tmp_path, "good", *BATCH, "--resume", "--model", "none")
    assert 'model was "demo" and is "none"' in error_line(result)
    result = run(tmp_path, "good", *BATCH, "--resume")
    assert (result.returncode, result.stderr) == (0, b"nothing to do: all 3 rows are done\n")


def test_ctrl_c_while_loading_leaves_no_output(tmp_path: Path) -> None:
    result = run(tmp_path, "good", *BATCH, "--model", "interrupt")
    assert result.returncode == 130
    assert b"go on with the same command and --resume\n" in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_model_that_cannot_be_opened_leaves_no_output(tmp_path: Path) -> None:
    result = run(tmp_path, "good", *BATCH, "--model", "none")
    assert result.returncode == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("output", ["no/out.jsonl", "."])
def test_an_output_that_cannot_be_made_is_refused_before_loading(tmp_path: Path, output: str) -> None:
    result = run(tmp_path, "good", "batch", "in.jsonl", "-o", output)
    assert result.returncode == 2
    assert error_line(result).startswith(output)
    assert b"loading" not in result.stderr


def test_streams(tmp_path: Path) -> None:
    result = run(tmp_path, "good", "batch", "-", "-o", "-", stdin=ROWS.encode())
    assert result.returncode == 0
    assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == [1, "line-2", 3]
    result = run(tmp_path, "good", "batch", "-", "-o", "-", "--resume", stdin=ROWS.encode())
    assert result.returncode == 2


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A batch of four rows that has written two and hangs in the third."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n' * 4)
    process = subprocess.Popen(
        command("waits-third", *BATCH), cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.PIPE
    )
    out = tmp_path / "out.jsonl"
    while not out.exists() or out.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.02)
    yield process
    process.kill()
    process.wait()
    if process.stderr is not None:
        process.stderr.close()


def resume_to_the_end(tmp_path: Path) -> None:
    assert ids(tmp_path) == ["line-1", "line-2"]
    assert run(tmp_path, "good", *BATCH, "--resume").returncode == 0
    assert ids(tmp_path) == ["line-1", "line-2", "line-3", "line-4"]


def test_a_second_ctrl_c_drops_the_running_row_and_says_how_to_go_on(
    tmp_path: Path, waiting: subprocess.Popen[bytes]
) -> None:
    assert waiting.stderr is not None
    waiting.send_signal(signal.SIGINT)
    while b"Ctrl-C again" not in waiting.stderr.readline():
        assert waiting.poll() is None
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 130
    assert err.endswith(
        b"2 rows written, 4 new tokens\ngo on with the same command and --resume\nrun-local: interrupted\n"
    )
    resume_to_the_end(tmp_path)


def test_too_many_errors(tmp_path: Path) -> None:
    result = run(tmp_path, "fails", *BATCH, "--max-errors", "2", "--stats-json", "s.json")
    assert result.returncode == 1
    assert ids(tmp_path) == [1, "line-2"]
    assert b"(--max-errors)" in result.stderr
    assert json.loads((tmp_path / "s.json").read_text())["batch"]["errors"] == 2
    for bad in ("0", "x"):
        assert run(tmp_path, "good", "batch", "in.jsonl", "-o", "o", "--max-errors", bad).returncode == 2


def test_a_kill_loses_nothing_that_was_done(tmp_path: Path, waiting: subprocess.Popen[bytes]) -> None:
    waiting.kill()
    waiting.wait()
    resume_to_the_end(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_named_pipe_is_read_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    process = subprocess.Popen(
        command("good", "batch", "pipe", "-o", "-"), cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE
    )
    (tmp_path / "pipe").write_text(ROWS)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out.count(b"\n")) == (0, 3)
