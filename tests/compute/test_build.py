"""Compiling the kernels: once for a machine, and a machine that cannot is told why in a line."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from offload.compute.kernels import Kernels, binding, build, load_kernels
from offload.compute.kernels.build import BuildError
from offload.compute.kernels.build import build as build_library

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a process that has loaded nothing yet. What it compiles need not be fast."""
    monkeypatch.setattr(build, "_FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in build._FLAGS))
    monkeypatch.setenv("RUN_LOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(binding, "_loaded", {})
    return tmp_path / "cache"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)


def why_not() -> str:
    """The reason that there are no kernels."""
    reasons: list[str] = []
    assert load_kernels(reasons.append) is None
    assert load_kernels(reasons.append) is None, "it is not tried again"
    assert load_kernels() is None
    assert len(reasons) == 2
    assert reasons[0] == reasons[1]
    assert reasons[0].strip()
    assert "\n" not in reasons[0]
    return reasons[0]


def script(folder: Path, text: str) -> str:
    """A compiler of our own making."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_no_compiler(no_compiler: None) -> None:
    assert why_not() == "no C compiler was found (cc, gcc or clang, or the one that CC names)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exit 1", "failed"),
        ("echo 'x.c:1: error: no such thing' >&2; echo more >&2; exit 1", "failed: x.c:1: error: no such thing"),
        ("printf 'one\\ntwo\\n' >&2; exit 3", "failed: one"),
        ("exit 0", "failed"),
    ],
    ids=["silent", "with an error", "with lines", "writes nothing"],
)
def test_failing_compiler(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = script(tmp_path, text)
    monkeypatch.setenv("CC", compiler)
    assert f"'{compiler}' {message}" in why_not()


def test_cc_false(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    assert "'false' failed" in why_not()


def test_cc_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nowhere/compiler --fast")
    assert "'/nowhere/compiler --fast' cannot be run" in why_not()


def test_cc_that_is_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "'gcc")
    assert why_not() == 'CC: "\'gcc" is no command (No closing quotation)'


def test_blank_cc_names_nothing(no_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "  ")
    assert why_not().startswith("no C compiler was found")


def test_compiler_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_SECONDS", 0.2)
    monkeypatch.setenv("CC", script(tmp_path, 'case "$*" in *-shared*) exec sleep 60;; esac'))
    assert "cannot be run" in why_not()


def test_cache_folder_that_cannot_be_written(kernels: Kernels, own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    assert f"{own_cache / 'kernels'}: cannot be written" in why_not()


def test_library_that_cannot_be_loaded(kernels: Kernels) -> None:
    build_library().write_bytes(b"no library")
    assert why_not()


def test_a_second_build_uses_the_first_ones_file(kernels: Kernels, own_cache: Path) -> None:
    first = build_library()
    made = first.stat()
    assert [path.name for path in (own_cache / "kernels").iterdir()] == [first.name], "nothing else is left there"
    second = build_library()
    assert (second, second.stat().st_mtime_ns, second.stat().st_ino) == (first, made.st_mtime_ns, made.st_ino)
    found = load_kernels()
    assert isinstance(found, Kernels)
    assert load_kernels() is found


def test_another_source_or_compiler_has_another_file(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_library()
    changed = tmp_path / "changed.c"
    changed.write_text("/* changed */\n")
    monkeypatch.setattr(build, "SOURCES", (*build.SOURCES, changed))
    second = build_library()
    assert second != first
    monkeypatch.setattr(build, "_processor", lambda: "another one")
    assert build_library() not in (first, second)
    assert first.exists()


def test_flags_that_the_compiler_does_not_know_are_left_out(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (real,) = build.find_compiler()
    unknown = 'case "$*" in *-march=native*|*-mcpu=native*) echo "error: unknown flag" >&2; exit 1;; esac'
    monkeypatch.setenv("CC", script(tmp_path, f'{unknown}\nexec {real} "$@"'))
    assert hasattr(ctypes.CDLL(str(build_library())), "rl_linear")


def test_two_processes_at_once_both_succeed(kernels: Kernels, own_cache: Path) -> None:
    code = "from offload.compute.kernels import load_kernels; load_kernels(print); assert load_kernels(), 'none'"
    children = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    for child in children:
        said, _ = child.communicate(timeout=300)
        assert (child.returncode, said) == (0, b"")
    assert len(os.listdir(own_cache / "kernels")) == 1, "one library, and nothing left of the others' work"


def test_the_error_is_one_of_its_own(no_compiler: None) -> None:
    with pytest.raises(BuildError):
        build_library()
