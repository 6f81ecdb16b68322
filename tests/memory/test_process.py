"""What the process and its cgroup say of memory, also in containers and where the system says nothing."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from offload.memory import process
from offload.memory.process import (
    available_memory,
    cgroup_limit,
    process_memory,
    release_free_memory,
    rss_bytes,
    rss_peak_bytes,
)

MIB = 2**20
V1_UNLIMITED = "9223372036854771712\n"


def tree(root: Path, version: int, limits: dict[str, str]) -> Path:
    """A cgroup file system below ``root`` with these limits by group."""
    for group, text in limits.items():
        folder = root / ("memory" if version == 1 else "") / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ("memory.limit_in_bytes" if version == 1 else "memory.max")).write_text(text)
    return root


def limit(tmp_path: Path, version: int, limits: dict[str, str], own: str) -> int | None:
    own_file = tmp_path / "own"
    own_file.write_text(own)
    return cgroup_limit(tree(tmp_path / "cgroup", version, limits), own_file)


V1 = "12:cpu,cpuacct:/other\n4:memory:{path}\n1:name=systemd:/other\n0::/other\n"


@pytest.mark.parametrize(("version", "own"), [(2, "0::{path}\n"), (1, V1)])
@pytest.mark.parametrize(
    ("limits", "path", "expected"),
    [
        ({"user/app": "1048576\n"}, "/user/app", MIB),
        ({"user/app": "1048576\n", "user": "4194304\n"}, "/user/app", MIB),
        ({"user/app": "4194304\n", "user": "1048576\n"}, "/user/app", MIB),
        ({"a/b/c/d": "max\n", "a/b/c": "5000000\n", "a/b": "4000000\n", "a": "9000000\n"}, "/a/b/c/d", 4_000_000),
        ({"user/app": "max\n", "user": "max\n"}, "/user/app", None),
        ({"user/app": V1_UNLIMITED, "": V1_UNLIMITED}, "/user/app", None),
        ({"": "3000000\n"}, "/", 3_000_000),
        # in a container the path is often the host's, and the mount is the group itself
        ({"": "3000000\n"}, "/docker/0123456789ab", 3_000_000),
        ({"": "3000000\n"}, "/../../system.slice/docker-0123.scope", 3_000_000),
        ({"user": "1000000\n"}, "/other", None),
        ({"user": "no number\n", "": "-1\n"}, "/user", None),
        ({"user": "", "": "2000000"}, "/user", 2_000_000),
        ({}, "/user", None),
    ],
)
def test_cgroup_limit(
    version: int, own: str, limits: dict[str, str], path: str, expected: int | None, tmp_path: Path
) -> None:
    assert limit(tmp_path, version, limits, own.format(path=path)) == expected


def test_both_versions_at_once(tmp_path: Path) -> None:
    """A hybrid system: the memory controller is with version 1, and version 2 has groups without limits."""
    tree(tmp_path / "cgroup", 1, {"app": "1000000"})
    assert limit(tmp_path, 2, {"app": "max"}, "3:memory:/app\n0::/app\n") == 1_000_000
    assert limit(tmp_path, 2, {"app": "500000"}, "3:memory:/app\n0::/app\n") == 500_000


@pytest.mark.parametrize("content", ["", "\n", "nonsense\n", "0:\n"])
def test_group_file_that_says_nothing(content: str, tmp_path: Path) -> None:
    assert limit(tmp_path, 2, {"": "1000000"}, content) is None


def test_no_cgroups(tmp_path: Path) -> None:
    assert cgroup_limit(tmp_path, tmp_path / "absent") is None
    (tmp_path / "own").write_text("0::/user\n")
    assert cgroup_limit(tmp_path / "absent", tmp_path / "own") is None


def test_the_real_system_answers() -> None:
    found = cgroup_limit()
    assert found is None or found >= 0


def test_rss_counts_what_is_touched() -> None:
    before = process_memory()
    assert before.anonymous > MIB
    assert before.total == before.anonymous + before.file
    block = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, len(block), 4096):
        block[page] = 1
    grown = process_memory().anonymous - before.anonymous
    assert 56 * MIB < grown < 80 * MIB
    assert rss_peak_bytes() >= before.total + 56 * MIB
    block.close()
    release_free_memory()
    assert process_memory().anonymous < before.anonymous + 32 * MIB
    assert rss_peak_bytes() >= before.total + 56 * MIB, "the peak stays"


def test_rss_agrees_with_psutil() -> None:
    assert abs(rss_bytes() - psutil.Process().memory_info().rss) < 16 * MIB


def test_peak_is_in_bytes() -> None:
    """A fresh process that took 200 MiB and gave them back."""
    code = (
        "from offload.memory.process import rss_bytes, rss_peak_bytes\n"
        "block = bytearray(b'x') * (200 * 2**20); del block\n"
        "print(rss_bytes(), rss_peak_bytes())"
    )
    root = Path(__file__).resolve().parents[2]
    answer = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    now, peak = map(int, answer.stdout.split())
    assert now < 150 * MIB < 200 * MIB < peak < 400 * MIB


def test_system_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *arguments: object, **named: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    memory = process_memory()
    assert memory.anonymous > MIB
    assert memory.file == 0
    assert rss_peak_bytes() > MIB
    assert cgroup_limit() is None


@pytest.mark.parametrize(
    ("free", "group", "used", "expected"),
    [
        (10_000, None, 500, 10_000),
        (10_000, 4_000, 500, 3_500),
        (2_000, 4_000, 500, 2_000),
        (2_000, 400, 500, 0),
    ],
)
def test_available_memory(
    free: int, group: int | None, used: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(process, "cgroup_limit", lambda: group)
    monkeypatch.setattr(process, "rss_bytes", lambda: used)
    assert available_memory() == expected
