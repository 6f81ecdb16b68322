"""Exit codes, streams and the one line that says what is wrong, in real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cli.running import command, environment, error_line, run
from tui.failures import report


def test_a_question_on_the_command_line(tmp_path: Path) -> None:
    result = run(tmp_path, "good", "chat", "what is it?")
    assert (result.returncode, result.stdout) == (0, b"A fine answer.\n")
    assert b"loading" in result.stderr and b"tokens/s" in result.stderr


def test_a_question_on_standard_input(tmp_path: Path) -> None:
    result = run(tmp_path, "good", "chat", "--plain", stdin=b"\xef\xbb\xbfwhat\nis it?\n")
    assert (result.returncode, result.stdout) == (0, b"A fine answer.\n")
    assert b"context 6 of" in result.stderr  # 3 words asked, 3 tokens answered


def test_both_are_joined(tmp_path: Path) -> None:
    result = run(tmp_path, "good", "chat", "--system", "be brief", "sum up:", stdin=b"a b c\n")
    assert result.returncode == 0
    assert b"context 10 of" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ([], b"", "standard input is empty"),
        (["fly"], b"", "invalid choice: 'fly'"),
        (["chat"], b" \n", "standard input is empty"),
        (["chat", "  "], b"x", "the question is empty"),
        (["chat"], b"caf\xe9 ol\xe9", "standard input: not valid UTF-8 at byte 3 (0xe9)"),
        (["chat", "x", "--warp", "9"], b"", "unrecognized arguments: --warp"),
        (["chat", "x", "--ctx", "few"], b"", "--ctx: 'few' is not a whole number"),
        (["chat", "x", "--device", "abacus"], b"", "--device: 'abacus' is not one of"),
        (["chat", "x", "--policy", "bad"], b"", "--policy: there is no policy 'bad'; there are lru, lfu"),
        (["chat", "x", "--stats-json", "no/where.json"], b"", "--stats-json: no/where.json cannot be written"),
        (["chat", "x", "--trace-out", "."], b"", "--trace-out: . cannot be written (Is a directory)"),
        (["chat", "x", "--trace-out", "a", "--stats-json", "./a"], b"", "a is the file of --stats-json too"),
        (["batch", "in.jsonl"], b"", "the following arguments are required: -o/--output"),
        (["batch", "in.jsonl", "-o", "out.jsonl"], b"", "in.jsonl: cannot be read (No such file or directory)"),
        (["pack", "--format", "int9"], b"", "--format: 'int9' is not one of native"),
        (["models", "--remove", "nothing"], b"", "--remove: there is no pack 'nothing'; there are: none"),
    ],
)
def test_usage_errors(tmp_path: Path, arguments: list[str], stdin: bytes, message: str) -> None:
    result = run(tmp_path, "good", *arguments, stdin=stdin)
    assert (result.returncode, result.stdout) == (2, b"")
    assert message in error_line(result)
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == []


def test_a_bad_variable_is_named(tmp_path: Path) -> None:
    result = run(tmp_path, "good", "chat", "x", RUN_LOCAL_CTX="1")
    assert (result.returncode, error_line(result)) == (2, "RUN_LOCAL_CTX must be at least 2 tokens")
    result = run(tmp_path, "good", "chat", "x", RUN_LOCAL_POLICY="bad")
    assert error_line(result).startswith("RUN_LOCAL_POLICY: there is no policy 'bad'")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("good", ["chat", "x", "--model", "none"], "none: there is no such model"),
        ("good", ["chat", "x", "--model", "memory"], "out of memory; give a smaller --ram"),
        ("fails", ["chat", "x"], "expert file: record 3 of layer 2 cannot be read"),
        ("good", ["chat", "a b c d e", "--ctx", "4"], "the question does not fit the context"),
        ("good", ["plan", "--ram", "1MiB"], "the smallest that works is --ram 500MiB"),
    ],
)
def test_failures(tmp_path: Path, script: str, arguments: list[str], message: str) -> None:
    result = run(tmp_path, script, *arguments)
    assert result.returncode == 1
    assert message in error_line(result)


def test_a_bug_leaves_a_report_and_one_line(tmp_path: Path) -> None:
    result = run(tmp_path, "bug", "chat", "my secret question")
    assert result.returncode == 1
    line = error_line(result)
    assert line.startswith("this is a bug (ZeroDivisionError: division by zero); please report it with ")
    report = Path(line.rpartition(" with ")[2])
    assert report.parent == tmp_path / "state" / "run-local" / "reports"
    text = report.read_text("utf-8")
    assert "Traceback" in text and "command: chat" in text and "secret" not in text


def test_debugging_shows_the_traceback(tmp_path: Path) -> None:
    result = run(tmp_path, "bug", "chat", "x", RUN_LOCAL_DEBUG="1")
    assert result.returncode == 1
    assert b"Traceback" in result.stderr and b"ZeroDivisionError" in result.stderr


def test_a_report_without_a_state_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run(tmp_path, "bug", "chat", "x", XDG_STATE_HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path))
    assert Path(error_line(result).rpartition(" with ")[2]).parent == tmp_path


@pytest.mark.parametrize("script", ["good", "fails"])
def test_statistics_are_written_at_the_end(tmp_path: Path, script: str) -> None:
    (tmp_path / "s.json").write_text("old")
    run(tmp_path, script, "chat", "x", "--stats-json", "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["model"] == "fake"


def test_no_engine_no_statistics(tmp_path: Path) -> None:
    run(tmp_path, "good", "chat", "x", "--model", "none", "--stats-json", "s.json")
    assert not (tmp_path / "s.json").exists()


def _start(tmp_path: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(*arguments),
        cwd=tmp_path,
        env=environment(tmp_path),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _wait_for(stream: object, text: bytes) -> bytes:
    seen = b""
    while text not in seen:
        piece = os.read(stream.fileno(), 4096)  # type: ignore[attr-defined]
        assert piece, seen
        seen += piece
    return seen


def test_sigint_while_answering(tmp_path: Path) -> None:
    process = _start(tmp_path, "waits", "chat", "x", "--stats-json", "s.json")
    assert _wait_for(process.stdout, b" second") == b"first second"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"\n")
    assert b"\nstopped\n" in err and b"Traceback" not in err
    assert json.loads((tmp_path / "s.json").read_text())["new_tokens"] == 2


def test_interrupt_while_loading(tmp_path: Path) -> None:
    result = run(tmp_path, "good", "chat", "x", "--model", "interrupt")
    assert result.returncode == 130
    assert result.stderr.endswith(b"run-local: interrupted\n")


@pytest.mark.parametrize("arguments", [["long", "chat", "x"], ["long", "batch", "in.jsonl", "-o", "-"]])
def test_a_closed_pipe_ends_quietly(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n' * 3)
    process = _start(tmp_path, *arguments)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 141
    assert b"Traceback" not in err and b"Exception ignored" not in err and b"error" not in err


def test_help_into_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        command("good", "--help"), cwd=tmp_path, env=environment(tmp_path), stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    assert process.stderr == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize(
    "arguments", [["good", "chat", "x"], ["good", "plan"], ["good", "batch", "in.jsonl", "-o", "-"]]
)
def test_a_full_disk_under_stdout(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            command(*arguments), cwd=tmp_path, env=environment(tmp_path), stdin=subprocess.DEVNULL, stdout=full,
            stderr=subprocess.PIPE,
        )  # fmt: skip
    assert result.returncode == 1
    assert error_line(result) == "the output cannot be written: No space left on device"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(tmp_path: Path, closed: str) -> None:
    line = " ".join(f"'{part}'" for part in command("good", "chat", "x", "--stats-json", "s.json"))
    result = subprocess.run(
        ["sh", "-c", f"{line} {closed}"], cwd=tmp_path, env=environment(tmp_path), capture_output=True
    )
    assert result.returncode == 0
    assert result.stdout in (b"A fine answer.\n", b"")
    assert b"Traceback" not in result.stderr
    assert json.loads((tmp_path / "s.json").read_text())["model"] == "fake"


def test_a_terminal_that_is_not_utf_8(tmp_path: Path) -> None:
    result = run(tmp_path, "escape", "chat", "x", PYTHONIOENCODING="latin-1", PYTHONUTF8="0")
    assert result.returncode == 0
    assert result.stdout == b"a\x1b[31mb\x07 ? \xe9\n"


def test_plan_pack_and_models(tmp_path: Path) -> None:
    result = run(tmp_path, "good", "plan")
    assert result.returncode == 0
    assert result.stdout.decode().splitlines()[2:] == [
        "skeleton      1.00 GiB  attention",
        "expert slots   1.0 MiB  10 of 20",
    ]
    assert json.loads(run(tmp_path, "good", "plan", "--json").stdout)["bytes"]["skeleton"] == 2**30
    result = run(tmp_path, "good", "pack", "--model", "org/name", "-o", "there")
    assert (result.returncode, result.stdout) == (0, b"there\n")
    assert b"there: 64 experts, 1.0 MiB\n" in result.stderr
    assert b"relative" not in result.stderr, "nothing is lost"
    result = run(tmp_path, "good", "pack", "--model", "org/name", "--format", "int4", "-o", "there")
    assert (result.returncode, result.stdout) == (0, b"there\n"), "scripts read the folder"
    assert result.stderr.decode().splitlines()[-3:] == [
        "error of the quantised weights relative to the weights (root mean squares):",
        "layers 1-8   8.10%  8.20%  8.30%  8.40%  8.50%  8.60%  8.70%  8.80%",
        "layers 9-10  8.90%  9.00%",
    ]
    result = run(tmp_path, "good", "models")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"there are no packs yet\n")


def test_offline_from_the_hubs_own_variable(tmp_path: Path) -> None:
    assert b"offline=True" in run(tmp_path, "good", "chat", "x", HF_HUB_OFFLINE="1").stderr
    assert b"offline=True" in run(tmp_path, "good", "chat", "x", "--offline").stderr
    assert b"offline=False" in run(tmp_path, "good", "chat", "x").stderr


def test_a_missing_package_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(ModuleNotFoundError("No module named 'rich'", name="rich.console")) == 1
    assert capsys.readouterr().err.startswith("run-local: error: the package 'rich.console' is not installed;")
