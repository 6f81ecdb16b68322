"""``run-local bench`` in real processes: tables and JSON, settings in turns, Ctrl-C, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.running import ROOT, environment, error_line
from tests.tiny_models import build_tiny

AB = ("--compare", "a=", "--compare", "b=--policy lfu")


def command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.cli.fake_bench", script, "bench", *arguments]


def scripted(folder: Path, **changes: str) -> dict[str, str]:
    """Settings without a policy of their own have one whose rates the scripted engine knows."""
    return environment(folder, **{"FAKE_BENCH_LOG": str(folder / "log"), "RUN_LOCAL_POLICY": "lru"} | changes)


def run(
    folder: Path, *arguments: str, script: str = "good", stdin: bytes = b"", **changes: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command(script, *arguments),
        cwd=folder,
        input=stdin,
        capture_output=True,
        env=scripted(folder, **changes),
        timeout=120,
        check=False,
    )


def opened(folder: Path) -> list[str]:
    """The policies of the processes that opened an engine, in order."""
    log = folder / "log"
    return log.read_text().split() if log.exists() else []


def test_a_table(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.returncode == 0
    lines = result.stdout.decode().splitlines()
    assert lines[0].startswith("fake on cpu: format native, policy lru, prefetch off, 10 expert slots (50% of the")
    assert lines[1] == "11 prompt tokens, 32 new ones to warm up, 32 measured; seed 0"
    assert lines[3].split() == ["FIGURE", "VALUE"]
    assert any(line.split() == ["decode,", "measured", "10.00", "tokens/s"] for line in lines)
    assert b"notice: EngineSettings(" in result.stderr


def test_one_json_object(tmp_path: Path) -> None:
    result = run(
        tmp_path, "--json", "--repeat", "2", "--new-tokens", "3", "--prompt-tokens=2", "--stats-json", "s.json"
    )
    found = json.loads(result.stdout)
    assert {"model", "device", "format", "experts", "bytes", "seconds", "memory", "bench"} <= set(found)
    assert [run["decode_tokens_per_s"] for run in found["bench"]["runs"]] == [10.0, 30.0]
    assert (found["bench"]["prompt_tokens"], found["bench"]["new_tokens"]) == (2, 3)
    assert json.loads((tmp_path / "s.json").read_text())["model"] == "fake"


def test_settings_run_in_turns_in_processes_of_their_own(tmp_path: Path) -> None:
    result = run(tmp_path, *AB, "--repeat", "3", "--model", "org/name", "--ctx=500", "--seed", "4", "--json")
    assert result.returncode == 0
    assert opened(tmp_path) == ["lru", "lfu"] * 3
    found = json.loads(result.stdout)
    assert (found["rounds"], found["order"]) == (3, ["a", "b"] * 3)
    first, second = found["settings"]
    assert (first["name"], first["flags"], second["flags"]) == ("a", [], ["--policy", "lfu"])
    assert second["summary"]["decode_tokens_per_s"] == {"median": 20.0, "min": 20.0, "max": 20.0, "ratio": 2.0}
    assert [run["bench"]["runs"][0]["seed"] for run in second["runs"]] == [4] * 3
    assert b"b: notice: EngineSettings(model='org/name'" in result.stderr and b"context_tokens=500" in result.stderr


def test_a_table_of_settings(tmp_path: Path) -> None:
    result = run(tmp_path, *AB)
    assert result.returncode == 0
    lines = result.stdout.decode().splitlines()
    assert lines[0].startswith("1 round, each setting in a process of its own: 11 prompt tokens")
    assert lines[1:3] == ["a: (no flags of its own)", "b: --policy lfu"]
    assert lines[5].split() == ["decode,", "measured", "a", *("10.00", "tokens/s") * 3, "1.000"]
    assert lines[6].split() == ["b", *("20.00", "tokens/s") * 3, "2.000"]


def test_the_parent_imports_nothing_heavy(tmp_path: Path) -> None:
    result = run(tmp_path, *AB, script="imports")
    assert (result.returncode, result.stderr.splitlines()[-1]) == (0, b"[]")


def test_a_context_that_is_large_enough_with_the_common_flags(tmp_path: Path) -> None:
    result = run(tmp_path, "--new-tokens", "3", "--compare", "a=--ctx 50")
    assert (result.returncode, opened(tmp_path)) == (0, ["lru"])


def test_flags_of_the_parents_environment_reach_every_setting(tmp_path: Path) -> None:
    result = run(tmp_path, "--compare", "a=", RUN_LOCAL_POLICY="lfu")
    assert (result.returncode, opened(tmp_path)) == (0, ["lfu"])


@pytest.mark.parametrize(
    ("arguments", "message", "policies"),
    [
        (("--model", "none", *AB), "setting 'a': none: there is no such model", ["lru"]),
        (
            (*AB, "--compare", "c=--policy bad", "--repeat", "2"),
            "setting 'c': --policy: there is no",
            ["lru", "lfu", "bad"],
        ),
    ],
)
def test_a_setting_that_fails(tmp_path: Path, arguments: tuple[str, ...], message: str, policies: list[str]) -> None:
    result = run(tmp_path, *arguments)
    assert (result.returncode, result.stdout) == (1, b"")
    assert error_line(result).startswith(message)
    assert opened(tmp_path) == policies


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--compare", "half"), "--compare: 'half' is not NAME=FLAGS"),
        (("--compare", "=--policy lfu"), "is not NAME=FLAGS"),
        (("--compare", "a=", "--compare", "a=--policy lfu"), "there are two settings called 'a'"),
        (("--compare", "a=--warp 9"), "--compare a: unrecognized arguments: --warp 9"),
        (("--compare", "a=--ctx few"), "--compare a: --ctx: 'few' is not a whole number"),
        (("--compare", "a=--residency 2"), "--compare a: --residency must be above 0"),
        (("--compare", "a=--policy 'lfu"), "--compare a: No closing quotation"),
        (("--compare", "a=--compare b="), "--compare a: --compare cannot differ between settings"),
        (("--compare", "a=--json"), "--compare a: --json cannot differ between settings"),
        (("--compare", "a=--repeat 1"), "--compare a: --repeat cannot differ between settings"),
        (("--compare", "a=--help"), "--compare a: FLAGS are flags of bench"),
        (("--compare", "a=--perplexity t.txt"), "--compare a: --perplexity cannot differ between settings"),
        (("--compare", "a=--ctx 64", "--perplexity", "t.txt"), "--compare a: --ctx decides the windows"),
        (("--compare", "a=--new-tokens 3", "--perplexity", "t.txt"), "--perplexity and --new-tokens do not go"),
        ((*AB, "--stats-json", "s.json"), "--stats-json: every setting would overwrite this file"),
        ((*AB, "--calibrate"), "--calibrate and --compare do not go together"),
        (("--new-tokens", "0"), "--new-tokens must be at least 1"),
        (("--new-tokens", "x"), "--new-tokens: 'x' is not a whole number"),
        (("--ctx", "70"), "--ctx: 75 tokens of prompt, warm-up and measured part do not fit a context of 70"),
        (("--new-tokens", "90"), "--ctx: 133 tokens of prompt, warm-up and measured part do not fit a context of 80"),
        (("--compare", "a=--ctx 70"), "--compare a: --ctx: 75 tokens of prompt"),
        (("--max-new-tokens", "5"), "unrecognized arguments: --max-new-tokens 5"),
        (("--tokens", "5"), "--tokens belongs to --perplexity FILE"),
        (("--perplexity", "none.txt"), "--perplexity: none.txt cannot be read (No such file or directory)"),
        (("--perplexity", "."), "--perplexity: . cannot be read (Is a directory)"),
        (("--perplexity", "empty.txt"), "--perplexity: empty.txt is empty"),
        (("--perplexity", "latin.txt"), "--perplexity: latin.txt: not valid UTF-8 at byte 3 (0xe9)"),
        (("--perplexity", "empty.txt", *AB), "--perplexity: empty.txt is empty"),
    ],
)  # fmt: skip
def test_usage_errors(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "t.txt").write_text("some text")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    result = run(tmp_path, *arguments)
    assert (result.returncode, result.stdout) == (2, b"")
    assert message in error_line(result)
    assert opened(tmp_path) in ([], ["lru"]) and ("--compare" not in arguments or not opened(tmp_path))


def test_ctrl_c_ends_the_running_setting(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("waits", *AB, "--repeat", "5"),
        cwd=tmp_path,
        env=scripted(tmp_path, TMPDIR=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not opened(tmp_path):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)  # ends only when the child has let go of the pipes
    assert (process.returncode, out) == (130, b"")
    assert err.endswith(b"run-local: interrupted\n") and b"Traceback" not in err
    assert opened(tmp_path) == ["lru"]


def test_ctrl_c_while_measuring(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("waits"),
        cwd=tmp_path,
        env=scripted(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not opened(tmp_path):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err


def test_calibrate(tmp_path: Path) -> None:
    result = run(tmp_path, "--calibrate", "--experts-dir", "there")
    assert result.returncode == 0
    assert result.stdout.decode().splitlines() == ["disk     1.8 GB/s  random reads", "memory  21.0 GB/s"]
    assert b"probing there\nwritten to calibration.json\n" in result.stderr
    result = run(tmp_path, "--calibrate", "--json")
    assert json.loads(result.stdout) == {"disk_bytes_per_s": 1.8e9}
    assert f"probing {tmp_path / 'cache' / 'packs'}".encode() in result.stderr


def test_the_whole_of_it_on_a_tiny_model(tmp_path: Path) -> None:
    """The real program: perplexities of two settings, with the reference passed from process to process."""
    model = build_tiny("qwen2_moe", tmp_path / "tiny")
    (tmp_path / "t.txt").write_text("the expert that the router picks is loaded from the disk into a slot\n" * 9)
    (tmp_path / "tmp").mkdir()
    result = subprocess.run(
        [
            sys.executable, str(ROOT / "run_local.py"), "bench", "--model", str(model), "--ctx", "64", "--json",
            "--perplexity", "t.txt", "--tokens", "100", "--compare", "all=", "--compare", "third=--residency 0.3",
        ],
        cwd=tmp_path,
        capture_output=True,
        env=environment(tmp_path, TMPDIR=str(tmp_path / "tmp"), HF_HUB_OFFLINE="1"),
        timeout=300,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    first, second = (setting["result"] for setting in found["settings"])
    assert (found["reference"], first["reference"], first["counted_tokens"]) == ("all", None, 98)
    assert first["mean_nll_nats"] == second["mean_nll_nats"]
    assert second["reference"] == {
        "perplexity_ratio": 1.0, "mean_kl_nats": 0.0, "top_token_agreement": 1.0, "kept_tokens": 320, "exact": True,
    }  # fmt: skip
    assert second["stats"]["experts"]["misses"] > first["stats"]["experts"]["misses"]
    assert not os.listdir(tmp_path / "tmp")
