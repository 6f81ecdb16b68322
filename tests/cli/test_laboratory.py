"""``trace`` and ``tune`` from the command line: what they print, write, refuse and leave behind."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import run_local
from cache.trace import load_trace
from tests.cli.running import ROOT, environment

SYNTH = ["--layers", "3", "--experts", "8", "--top-k", "2", "--tokens", "30", "--requests", "5", "--prompt-tokens", "3"]


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    assert run_local.main(["trace", "synth", "t.npz", *SYNTH, "--overlap", "0:0.4,2:0.7", "--repeat", "0.4"]) == 0
    out, err = capsys.readouterr()
    assert out == "t.npz\n" and "5 requests, 3 layers, 8 experts, top 2" in err
    return Path("t.npz")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_local.main(list(arguments))
    out, err = capsys.readouterr()
    assert "Traceback" not in err and "\x1b" not in out
    return code, out, err


def test_trace_info(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "trace", "info", str(trace))
    assert code == 0
    assert "15 of prompts, 150 decoded" in out and "same experts as the token before" in out
    assert len([line for line in out.splitlines() if line.strip().startswith(("0 ", "1 ", "2 ")) and "%" in line]) >= 3
    code, out, _ = run(capsys, "trace", "info", "--json", str(trace), str(trace))
    first, second = json.loads(out)
    assert first == second and first["requests"] == 5 and len(first["by_layer"]) == 3
    assert "predictors" not in first
    code, out, _ = run(capsys, "trace", "info", "--json", "--recall", "2,8", str(trace))
    scores = {(one["predictor"], one["guesses"]): one for one in json.loads(out)[0]["predictors"]}
    assert {name for name, _ in scores} == {"layer-markov", "previous-token", "popularity"}
    assert scores["popularity", 8]["recall"] == 1.0 and scores["popularity", 8]["precision"] == pytest.approx(2 / 8)
    assert "PRECISION" in run(capsys, "trace", "info", "--recall", "2", str(trace))[1]
    assert {"lags", "working_set", "mean", "uniform_overlap", "prefill_tokens", "decode_tokens"} <= first.keys()


def test_convert_merge_and_split(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "trace", "convert", "t.npz", "t.csv")[:2] == (0, "t.csv\n")
    assert run(capsys, "trace", "convert", "t.csv", "again.npz", "--model", "m")[0] == 0
    assert (load_trace(Path("again.npz")).ids == load_trace(trace).ids).all()
    assert run(capsys, "trace", "merge", "t.npz", "t.csv", "both.jsonl")[0] == 0
    _, out, _ = run(capsys, "trace", "split", "both.jsonl", "part.npz", "--folds", "3")
    assert out.split() == ["part-0.npz", "part-1.npz", "part-2.npz"]
    assert sum(len(load_trace(Path(name))) for name in out.split()) == 2 * len(load_trace(trace))
    _, out, _ = run(capsys, "trace", "split", "t.npz", "one.npz", "--by", "request")
    assert len(out.split()) == 5
    assert run(capsys, "trace", "convert", "t.npz", "sorted.npz", "--sort")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["trace", "info", "none.npz"], 1, "none.npz: there is no such file"),
        (["trace", "info", "cut.npz"], 1, "cut.npz: the file is damaged or cut off"),
        (["trace", "info", "text.txt"], 1, "text.txt: its beginning is of no known form; name one with --form"),
        (["trace", "info", "t.npz", "--recall", "0"], 2, "--recall must be at least 1"),
        (
            ["tune", "t.npz", "--predictor", "next-gate"],
            2,
            "'next-gate' is no predictor that a trace can be replayed with",
        ),
        (["trace", "convert", "text.txt", "o.npz", "--form", "csv"], 1, "text.txt, line 1: the header needs"),
        (["trace", "convert", "t.npz", "o.txt"], 2, "o.txt: the name must end in .npz, .csv, .jsonl"),
        (["trace", "convert", "t.npz", "no/o.npz"], 2, "there is no folder"),
        (["trace", "convert", "t.csv", "o.npz", "--phase", "x"], 2, "--phase: 'x' is not one of"),
        (["trace", "convert", "t.npz", "o.npz", "--sort", "--form", "csv"], 2, "--sort and --form"),
        (["trace", "merge", "t.npz", "u.npz", "o.npz"], 1, "u.npz: experts is 32, but 8 in t.npz"),
        (["trace", "split", "t.npz", "o.npz", "--folds", "9"], 2, "--folds: t.npz has 5 requests"),
        (["trace", "synth", "o.npz", "--top-k", "99"], 2, "--top-k must be between 1 and 32"),
        (["trace", "synth", "o.npz", "--like", "x"], 2, "--like: there is no 'x'; there are mixtral-8x7b"),
        (["trace", "synth", "o.npz", "--repeat", "a"], 2, "--repeat: 'a' is neither a number nor a list"),
        (["trace"], 2, "the following arguments are required: COMMAND (see run-local trace --help)"),
        (["tune", "none.npz"], 1, "none.npz: there is no such file"),
        (["tune", "t.npz", "u.npz"], 1, "traces of different models cannot be merged"),
        (["tune", "t.npz", "--policy", "best"], 2, "there is no policy 'best'; there are"),
        (["tune", "t.npz", "--scope", "all"], 2, "there is no scope 'all'"),
        (["tune", "t.npz", "--residency", "0"], 2, "--residency must be above 0"),
        (["tune", "t.npz", "--residency", ","], 2, "--residency: the list is empty"),
        (["tune", "t.npz", "--ram", "1GiB"], 2, "--ram: how many experts fit cannot be told"),
        (["tune", "t.npz", "--ram", "1GiB", "--vram", "1GiB"], 2, "--ram and --vram are different budgets"),
        (["tune", "t.npz", "--plot", "a.png"], 2, "--plot: a.png does not end in .svg"),
        (["tune", "t.npz", "--csv", "no/a.csv"], 2, "--csv: no/a.csv cannot be written (no such folder)"),
        (["tune", "t.npz", "--save", "a/b"], 2, "--save: 'a/b' is no name for a preset"),
        (["tune", "t.npz", "--hardware", "abacus"], 2, "--hardware: "),
        (["tune", "t.npz", "--hardware", "rtx4090"], 2, "--hardware needs the size of an expert"),
        (
            ["tune", "t.npz", "--ram", "2MiB", "--expert-size", "1MiB", "--resident-size", "5MiB"],
            2,
            "the smallest that works is --ram 6MiB",
        ),
    ],
)
def test_what_makes_no_sense(
    trace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, reason: str
) -> None:
    if any(word.startswith(("t.csv", "u.npz", "cut", "text")) for word in arguments):
        Path("cut.npz").write_bytes(trace.read_bytes()[:900])
        Path("text.txt").write_text("Dear Sir,\n")
        run_local.main(["trace", "convert", "t.npz", "t.csv"])
        run_local.main(["trace", "synth", "u.npz", "--layers", "1", "--tokens", "1", "--requests", "1"])
        capsys.readouterr()
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (code, "")
    (line,) = err.splitlines()
    assert line.startswith("run-local: error: ") and reason in line


TUNE = ["--policy", "lru,lfu,ewma:half_life=4|16", "--jobs", "1", "--folds", "3"]


def test_tune_prints_a_table_and_ends_with_a_line_to_paste(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "tune", "t.npz", *TUNE, "--plot", "p.svg", "--csv", "r.csv", "--save", "mine")
    assert code == 0
    lines = out.splitlines()
    assert "POLICY" in out and "belady" in out and "└" in out
    command = shlex.split(lines[-1])
    assert command[:2] == ["run-local", "chat"] and "--residency" in command and "--scope" in command
    assert "points" in lines[-2] and "±" in lines[-2]
    assert run_local.build_parser().parse_args(command[1:]).residency == "0.5"
    ET.fromstring(Path("p.svg").read_text("utf-8"))
    rows = list(csv.DictReader(io.StringIO(Path("r.csv").read_text("utf-8"))))
    assert len(rows) == 3 * 2 * (4 + 1) + 3 * 1, "sizes, scopes, candidates and Belady; the default in its own scope"
    assert all(0 <= float(row["hit_rate"]) <= 1 and row["hit_rate_fold_2"] for row in rows)
    assert "kept as preset mine" in err and (Path("config") / "run-local" / "presets" / "mine.toml").exists()


def test_tune_as_json(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = ["--ram", "2GiB", "--expert-size", "1MiB", "--resident-size", "2036MiB"]
    code, out, _ = run(capsys, "tune", "t.npz", *TUNE, "--json", *budget)
    found = json.loads(out)
    assert (code, found["slots"], dict(found["flags"])["--ram"]) == (0, 12, "2GiB")
    assert sorted({row["slots"] for row in found["results"]}) == [3, 6, 12]
    assert found["advice"][-1]["cross_validated"] is True
    code, out, _ = run(capsys, "tune", "t.npz", *TUNE, "--json", "--slots", "7", "--residency", "1", "--scope", "layer")
    found = json.loads(out)
    assert found["slots"] == 7 and float(dict(found["flags"])["--residency"]) == pytest.approx(7 / 24, abs=1e-5)


def test_with_hardware_the_speed_decides(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = ["--hardware", "laptop", "--expert-size", "1MiB", "--predictor", "off,layer-markov", "--scope", "global"]
    arguments = ["tune", "t.npz", "--policy", "lru", "--residency", "0.5", "--jobs", "1", "--folds", "2", *machine]
    code, out, _ = run(capsys, *arguments, "--json")
    found = json.loads(out)
    assert code == 0 and found["advice"][0]["gain_unit"] == "share of tokens_per_s"
    rows = {(row["policy"], row["predictor"], row["learn"]): row for row in found["results"]}
    assert {key[1:] for key in rows if key[0] == "lru"} == {
        (None, False),
        ("layer-markov", False),
        ("layer-markov", True),
    }
    assert all(row["tokens_per_s"] > 0 for row in rows.values())
    assert rows["belady", None, False]["tokens_per_s"] == max(
        row["tokens_per_s"] for row in rows.values() if row["predictor"] is None
    )
    out = run(capsys, *arguments)[1]
    assert "TOKENS/S" in out and "PREFETCH" in out and "BEFORE" in out
    assert ("--prefetch" in out.splitlines()[-1]) == (dict(found["flags"]).get("--prefetch") is not None)


def test_processes_give_the_same_as_one(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = run(capsys, "tune", "t.npz", "--policy", "lru", "--json", "--jobs", "1")[1]
    assert run(capsys, "tune", "t.npz", "--policy", "lru", "--json", "--jobs", "2")[1] == alone


def test_what_was_learned_from_is_kept_with_the_preset(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tui.config_file import read_preset

    alike = ["--layers", "2", "--experts", "16", "--top-k", "1", "--tokens", "200", "--requests", "1"]
    for request in range(3):  # the same request three times, of draws by popularity alone: a fixed order is best
        drawn = ["--topic", "0", "--skew", "1", "--coupling", "0", "--prompt-tokens", "0"]
        run(capsys, "trace", "synth", f"{request}.npz", *alike, *drawn)
    code, out, _ = run(
        capsys, "tune", "0.npz", "1.npz", "2.npz", "--policy", "static", "--scope", "layer", "--residency", "0.4",
        "--jobs", "1", "--save", "fixed",
    )  # fmt: skip
    command = out.splitlines()[-1]
    assert code == 0 and "--policy static" in command and "--learn-from 0.npz --learn-from 1.npz" in command
    kept = read_preset("fixed", ["policy", "scope", "residency", "learn_from"]).texts
    assert kept["policy"] == ["static"]
    assert len(load_trace(Path(kept["learn_from"][0]))) == 3 * len(load_trace(Path("0.npz")))


def test_neither_command_imports_what_is_heavy(trace: Path, tmp_path: Path) -> None:
    code = (
        "import sys, run_local\n"
        "assert run_local.main(['trace', 'info', 't.npz']) == 0\n"
        "assert run_local.main(['tune', 't.npz', '--policy', 'lru', '--jobs', '1']) == 0\n"
        "print([name for name in ('torch', 'transformers', 'textual') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert result.stdout.endswith("\n[]\n"), result.stderr


@pytest.mark.parametrize("wait", [0.0, 0.3, 1.0], ids=["at once", "while processes start", "while they replay"])
def test_ctrl_c_leaves_no_process_behind(trace: Path, tmp_path: Path, wait: float) -> None:
    run_local.main(["trace", "synth", "big.npz", "--tokens", "2000", "--requests", "2"])
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_local.py"), "tune", "big.npz", "--jobs", "2"],
        cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    first = process.stderr.readline()
    assert first.startswith(b"replaying: 0 of")
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: the workers are sent it, too
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err and err.endswith(b"run-local: interrupted\n"), err
    deadline = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:  # the last of the group go when they notice that the parent has gone
            os.killpg(process.pid, 0)
            time.sleep(0.05)
