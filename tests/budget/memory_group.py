"""Runs a command in a memory cgroup of exactly so many bytes, and watches what it takes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Run:
    """``peak_anonymous`` is the most anonymous memory that was seen, in bytes; ``killed`` counts OOM kills."""

    code: int
    stdout: str
    stderr: str
    peak_anonymous: int
    killed: int


def run_in_group(command: list[str], limit: int, env: dict[str, str] | None = None) -> Run:
    """Run ``command`` with ``limit`` bytes for all of its memory, page cache included. Skips where that cannot be."""
    with _group(limit) as group:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | (env or {}),
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        )
        peak = 0

        def watch() -> None:
            nonlocal peak
            while process.poll() is None:
                peak = max(peak, _anonymous(process.pid))
                time.sleep(0.005)

        watcher = threading.Thread(target=watch)
        watcher.start()
        stdout, stderr = process.communicate()
        watcher.join()
        return Run(process.returncode, stdout, stderr, peak, _kills(group))


@contextlib.contextmanager
def _group(limit: int) -> Iterator[Path]:
    version1 = (_ROOT / "memory").is_dir()
    group = (_ROOT / "memory" if version1 else _ROOT) / f"run-local-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if version1 else "memory.max")).write_text(str(limit))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"this machine lets no memory cgroup be made ({error.strerror})")
    try:
        yield group
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def _anonymous(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _kills(group: Path) -> int:
    for name in ("memory.events", "memory.oom_control"):
        with contextlib.suppress(OSError):
            for line in (group / name).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0
