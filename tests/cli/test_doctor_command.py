"""``run-local doctor``: settings, variables, folders, what it prints and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import ROOT, environment
from tui.command_line import shared_flags
from tui.doctor import examine_front_end, finding_lines, verdict

COMMANDS = ("chat", "batch")


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("CONFIG", "DATA", "STATE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    folder = tmp_path / "config" / "run-local"
    (folder / "presets").mkdir(parents=True)
    return folder


def bad(environ: dict[str, str]) -> list[tuple[str, str, str]]:
    found = examine_front_end(shared_flags(), COMMANDS, environ)
    return [(one.state, one.text, one.remedy) for one in found if one.state != "ok"]


def test_nothing_set_is_fine() -> None:
    assert bad({"RUN_LOCAL_CTX": "512", "RUN_LOCAL_CACHE": "/x", "RUN_LOCAL_STOP": ""}) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ctx = 'many'", "'many' is not a whole number"),
        ("polcy = 'lru'", "did you mean 'policy'?"),
        ("device = 'toaster'", "toaster"),
        ("temperature = -1", "temperature"),
        ("[nonsense]\nctx = 1", "[nonsense]"),
        ("ctx = ", "not TOML"),
    ],
)
def test_a_config_that_stops_every_command(config: Path, text: str, said: str) -> None:
    (config / "config.toml").write_text(text)
    ((state, what, _),) = bad({})
    assert state == "problem" and said in what and "config.toml" in what


def test_a_broken_preset_is_a_note(config: Path) -> None:
    (config / "presets" / "mine.toml").write_text("policy = 'lru'\nctx = 'x'")
    ((state, what, remedy),) = bad({})
    assert state == "note" and "mine" in what and "--preset mine" in remedy


def test_variables() -> None:
    assert bad({"RUN_LOCAL_POLCY": "lru"}) == [
        ("note", "nothing reads the variable RUN_LOCAL_POLCY", "did you mean RUN_LOCAL_POLICY?")
    ]
    ((state, what, remedy),) = bad({"RUN_LOCAL_CTX": "-5"})
    assert state == "problem" and what.startswith("RUN_LOCAL_CTX") and remedy == "unset RUN_LOCAL_CTX"


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    ((state, what, _),) = bad({})
    assert state == "note" and "conversations" in what


def run(tmp_path: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "run_local.py"), "doctor", *arguments],
        env=environment(tmp_path, **changes),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_command_says_what_is_wrong_and_fails(tmp_path: Path, config: Path) -> None:
    (config / "config.toml").write_text("ctx = 'many'")
    result = run(tmp_path, XDG_CONFIG_HOME=str(config.parent))
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("PROBLEM")]
    assert "config.toml" in lines[at] and lines[at + 1].strip() == "do: mend the file; every command stops there"
    assert result.stderr.strip().startswith("1 problem, ")


def test_the_command_as_json(tmp_path: Path) -> None:
    result = run(tmp_path, "--json")
    assert result.returncode == 0
    findings = json.loads(result.stdout)["findings"]
    assert all(set(one) == {"area", "state", "text", "remedy"} for one in findings)
    assert {"settings", "packages", "memory", "storage"} <= {one["area"] for one in findings}


def test_lines_and_verdict() -> None:
    from offload.events import Finding

    one, two = Finding("card", "problem", "gone\nwrong", "mend it"), Finding("hub", "note", "slow", "wait")
    assert finding_lines(one) == "PROBLEM  card       gone wrong\n                    do: mend it\n"
    assert verdict([one, two, two]) == "1 problem, 2 notes"
    assert verdict([]) == "no problems, no notes"
