"""Processes of settings: their results, their failures, and that none outlives the comparison."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from offload.bench.child import run_child
from offload.bench.compare import compare_quality, compare_speed
from offload.bench.request import Setting
from offload.errors import RunLocalError


def child(code: str) -> list[str]:
    return [sys.executable, "-c", f"import json, os, sys, time\n{code}"]


def run(code: str) -> dict[str, object]:
    return run_child("a", child(code), lambda line: None)


def test_a_result_and_what_is_said_on_the_way() -> None:
    lines: list[str] = []
    code = "print('one', file=sys.stderr); print('', file=sys.stderr); print(json.dumps({'x': 'é'}))"
    assert run_child("a", child(code), lines.append) == {"x": "é"}
    assert lines == ["one"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('run-local: error: no such model', file=sys.stderr); sys.exit(1)", "setting 'a': no such model"),
        ("sys.exit(3)", "setting 'a': its process ended with exit code 3"),
        ("sys.exit(130)", "setting 'a': it was interrupted"),
        ("os.kill(os.getpid(), 9)", "setting 'a': its process was killed, most likely for want of memory"),
        ("os.kill(os.getpid(), 11)", "setting 'a': its process was ended by signal 11"),
        ("print('nonsense')", "setting 'a': its process printed no result"),
        ("print('[1]')", "setting 'a': its process printed no result"),
    ],
)
def test_failures_name_the_setting(code: str, message: str) -> None:
    with pytest.raises(RunLocalError, match=f"^{message}$"):
        run(code)


def test_a_command_that_does_not_exist() -> None:
    with pytest.raises(RunLocalError, match="setting 'a': /no/python cannot be started"):
        run_child("a", ["/no/python"], lambda line: None)


def test_much_output_on_both_streams_does_not_block() -> None:
    result = run("print('x' * 10**6 + '\\n' * 10**4, file=sys.stderr); print(json.dumps({'x': 'y' * 10**6}))")
    assert len(str(result["x"])) == 10**6


def test_what_ends_the_call_ends_the_process(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run(f"open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def result(rate: float) -> str:
    figures = {"decode_tokens_per_s": rate, "prefill_tokens_per_s": 2 * rate, "rss_peak_bytes": 2**20}
    bench = {"prompt_tokens": 1, "warmup_tokens": 1, "new_tokens": 1, "runs": [figures]}
    return f"print(json.dumps({ {'bench': bench}!r}))"


def test_settings_run_in_turns(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def command(setting: Setting, ours: list[str]) -> list[str]:
        rate = {"a": 10.0, "b": 15.0}[setting.name] + (len(log.read_text()) if log.exists() else 0)
        return child(f"open({str(log)!r}, 'a').write({setting.name!r})\n{result(rate)}")

    settings = [Setting("a", ()), Setting("b", ("--policy", "lfu"))]
    lines: list[str] = []
    found = compare_speed(settings, 3, command, lines.append)
    assert log.read_text() == "ababab"
    assert found.order == ("a", "b", "a", "b", "a", "b")
    assert lines[:4] == ["a: round 1 of 3", "a: 10.00 tokens/s", "b: round 1 of 3", "b: 16.00 tokens/s"]
    first, second = found.to_json()["settings"]
    assert first["summary"]["decode_tokens_per_s"] == {"median": 12.0, "min": 10.0, "max": 14.0, "ratio": 1.0}
    assert second["summary"]["decode_tokens_per_s"] == {"median": 18.0, "min": 16.0, "max": 20.0, "ratio": 1.5}
    assert second["flags"] == ["--policy", "lfu"] and len(second["runs"]) == 3
    assert first["summary"]["ttft_s"] is None, "not measured"
    rows = found.rows()
    assert rows[0] == ("FIGURE", "SETTING", "MEDIAN", "MIN", "MAX", "RATIO")
    assert rows[1] == ("decode, measured", "a", "12.00 tokens/s", "10.00 tokens/s", "14.00 tokens/s", "1.000")
    assert rows[2][1:] == ("b", "18.00 tokens/s", "16.00 tokens/s", "20.00 tokens/s", "1.500")
    assert ("request to first token", "a", "-", "-", "-", "-") in rows


def test_the_first_failure_is_the_last_run(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def command(setting: Setting, ours: list[str]) -> list[str]:
        good = result(1.0) if setting.name == "a" else "sys.exit('run-local: error: broken')"
        return child(f"open({str(log)!r}, 'a').write({setting.name!r})\n{good}")

    with pytest.raises(RunLocalError, match="setting 'b': broken"):
        compare_speed([Setting("a", ()), Setting("b", ()), Setting("c", ())], 3, command, lambda line: None)
    assert log.read_text() == "ab"


def test_the_probabilities_pass_through_a_file_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: list[list[str]] = []

    def command(setting: Setting, ours: list[str]) -> list[str]:
        seen.append(ours)
        (flag,) = ours
        path = flag.partition("=")[2]
        code = f"open({path!r}, 'wb').write(b'x' * 5); size = -1"
        if not flag.startswith("--reference-out="):
            code = f"size = len(open({path!r}, 'rb').read())"
        against = {"perplexity_ratio": 1.5, "mean_kl_nats": 0.25, "top_token_agreement": 0.5}
        found = {"file": "f", "counted_tokens": 3, "window_tokens": 4, "mean_nll_nats": 1.0, "perplexity": 2.7}
        other = f"{against!r} if size >= 0 else None"
        return child(f"{code}\nprint(json.dumps({found!r} | {{'size': size, 'reference': {other}}}))")

    settings = [Setting("a", ()), Setting("b", ("--format", "int4")), Setting("c", ())]
    comparison = compare_quality(settings, command, lambda line: None)
    assert [ours[0].partition("=")[0] for ours in seen] == ["--reference-out", "--reference", "--reference"]
    assert [run["result"]["size"] for run in comparison.to_json()["settings"]] == [-1, 5, 5]
    assert comparison.to_json()["reference"] == "a"
    assert comparison.rows()[1][3:] == ("1.0000", "-", "-")
    assert comparison.rows()[2][3:] == ("1.5000", "0.250000", "50.00 %")
    assert not list(tmp_path.iterdir())


def test_a_failed_comparison_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    during: list[list[Path]] = []

    def command(setting: Setting, ours: list[str]) -> list[str]:
        during.append(list(tmp_path.iterdir()))
        return child("sys.exit(1)")

    with pytest.raises(RunLocalError):
        compare_quality([Setting("a", ()), Setting("b", ())], command, lambda line: None)
    assert during == [[]] and not list(tmp_path.iterdir())
