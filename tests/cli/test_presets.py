"""Flags kept in files: who wins over whom, and one line for what makes no sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import run_local
from offload.config import DEFAULT_POLICY
from offload.errors import UsageError
from tests.cli.running import error_line
from tests.cli.running import run as run_fake
from tui.config_file import preset_path, save_preset
from tui.flags import FlagValues


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("RUN_LOCAL_POLICY", "RUN_LOCAL_PRESET", "RUN_LOCAL_CTX"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "run-local").mkdir()
    return tmp_path / "run-local"


def values(*arguments: str) -> FlagValues:
    return run_local.flag_values(run_local.build_parser().parse_args(list(arguments)))


def test_flag_then_variable_then_preset_then_file_then_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert values("chat").engine().policy == DEFAULT_POLICY
    (folder / "config.toml").write_text('policy = "lfu"\nctx = 64\nverify = true\nstop = ["a", "b"]\n')
    assert values("chat").engine().policy == "lfu"
    save_preset(preset_path("mine", ""), [("--policy", "lru"), ("--residency", "0.5")], ["a remark"])
    given = values("chat", "--preset", "mine")
    assert (given.engine().policy, given.engine().residency, given.engine().context_tokens) == ("lru", 0.5, 64)
    assert given.engine().verify and given.sampling().stop == ("a", "b")
    monkeypatch.setenv("RUN_LOCAL_POLICY", "ewma:half_life=3")
    assert values("chat", "--preset", "mine").engine().policy == "ewma:half_life=3"
    assert values("chat", "--preset", "mine", "--policy", "lfu").engine().policy == "lfu"


def test_a_preset_can_be_named_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two", "three"):
        save_preset(preset_path(name, ""), [("--policy", f"ewma:half_life={len(name)}")], [])
    (folder / "config.toml").write_text('preset = "three"\n')
    assert values("chat").engine().policy == "ewma:half_life=5"
    monkeypatch.setenv("RUN_LOCAL_PRESET", "two")
    assert values("plan", "--preset", "three").given["preset"] == "three"
    assert values("batch", "i", "-o", "o").engine().policy == "ewma:half_life=3"
    (folder / "presets" / "two.toml").unlink()
    with pytest.raises(UsageError, match="RUN_LOCAL_PRESET: there is no preset 'two'; there are one, three"):
        values("chat")


def test_a_table_holds_for_one_command(folder: Path) -> None:
    (folder / "config.toml").write_text(
        'ctx = 64\n[bench]\nctx = 128\n[keys]\nquit = "ctrl+q"\n[tui]\ntheme = "dark"\n'
    )
    assert values("chat").engine().context_tokens == 64
    assert values("bench").engine().context_tokens == 128


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("polcy = 'lru'", "config.toml: there is no flag 'polcy'; did you mean 'policy'?"),
        ("colour = 1", "config.toml: there is no flag 'colour'; run-local config show lists all"),
        ("[chta]\nctx = 1", r"config.toml: there is no table \[chta\]; there are chat, batch"),
        ("[bench]\nx = 1", "config.toml: there is no flag 'x'"),
        ("ctx = ", "config.toml: not TOML"),
        ("ctx = {a = 1}", r"there is no table \[ctx\]"),
        ("ctx = []", "config.toml: ctx must be a text, a number or true or false"),
        ("ctx = 'many'", r"ctx in .*config.toml: 'many' is not a whole number"),
        ("ctx = 1", r"ctx in .*config.toml must be at least 2 tokens"),
        ("preset = '../x'", "preset in .*config.toml: '../x' is no name for a preset"),
        ("preset = 'x'", "preset in .*config.toml: there is no preset 'x'; there are none yet: run-local tune --save"),
    ],
)
def test_mistakes_name_the_file(folder: Path, text: str, reason: str) -> None:
    (folder / "config.toml").write_text(text)
    with pytest.raises(UsageError, match=reason):
        given = values("chat")
        try:
            given.engine()
        except UsageError as error:
            raise UsageError(given.blame(str(error))) from error


def test_files_that_are_no_text(folder: Path) -> None:
    (folder / "config.toml").write_bytes(b"ctx = 1\xff")
    with pytest.raises(UsageError, match=r"config.toml: not valid UTF-8 at byte 7"):
        values("chat")
    (folder / "config.toml").unlink()
    (folder / "config.toml").mkdir()
    with pytest.raises(UsageError, match=r"config.toml: cannot be read \(Is a directory\)"):
        values("chat")


def test_a_preset_cannot_name_another(folder: Path) -> None:
    save_preset(preset_path("a", ""), [("--preset", "a")], [])
    with pytest.raises(UsageError, match="a preset cannot name another one"):
        values("chat", "--preset", "a")


def test_chat_uses_a_preset(folder: Path, tmp_path: Path) -> None:
    save_preset(preset_path("mine", ""), [("--policy", "lru"), ("--ram", "3GiB")], [])
    result = run_fake(tmp_path, "good", "chat", "x", "--preset", "mine", XDG_CONFIG_HOME=str(tmp_path))
    assert result.returncode == 0 and b"policy='lru'" in result.stderr and b"ram=3221225472" in result.stderr
    result = run_fake(tmp_path, "good", "chat", "x", "--preset", "none", XDG_CONFIG_HOME=str(tmp_path))
    assert result.returncode == 2 and "--preset: there is no preset 'none'; there are mine" in error_line(result)


def test_config_show(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "config.toml").write_text("ctx = 64\n")
    save_preset(preset_path("mine", ""), [("--policy", "lru")], [])
    monkeypatch.setenv("RUN_LOCAL_SEED", "7")
    assert run_local.main(["config", "show", "--preset", "mine", "--ram", "1GiB", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    rows = {row["flag"]: (row["value"], row["source"]) for row in shown["flags"]}
    assert rows["--ram"] == (2**30, "flag")
    assert rows["--seed"] == (7, "RUN_LOCAL_SEED")
    assert rows["--policy"][0] == "lru" and rows["--policy"][1].startswith("policy in preset mine (")
    assert rows["--ctx"] == (64, f"ctx in {folder / 'config.toml'}")
    assert rows["--kernels"] == ("auto", "default") and rows["--temperature"] == (None, "default")
    assert (shown["presets"], shown["file"]) == (["mine"], str(folder / "config.toml"))
    assert run_local.main(["config", "show"]) == 0
    out = capsys.readouterr().out
    assert "\npresets: mine\n" in out and len(out.splitlines()) == len(rows) + 4
    (folder / "config.toml").write_text("ctx = 1\n")
    assert run_local.main(["config", "show"]) == 2
    assert "config.toml must be at least 2 tokens" in capsys.readouterr().err
