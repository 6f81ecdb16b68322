"""One process packs a model at a time, and a process that died is in nobody's way."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from offload.checkpoint import lock as lock_module
from offload.checkpoint.lock import pack_lock
from offload.checkpoint.source import open_source
from offload.errors import ExpertFileError, RunLocalError
from tests.checkpoint.packs import Stopped, watch_reads, write_pack

HOLD_LOCK = """
import fcntl, sys
handle = open(sys.argv[1], "w")
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_lock_of_a_living_and_of_a_dead_process(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pack"
    source = open_source(checkpoint)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(tmp_path / "pack.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ExpertFileError, match="another process is packing this model now; wait until it is done"):
            write_pack(source, folder)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["pack.lock"]
    finally:
        holder.kill()
        holder.communicate()
    write_pack(source, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pack"]


def is_held(path: Path) -> bool:
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@pytest.mark.parametrize("third", [False, True])
def test_lock_file_removed_between_open_and_lock(third: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder ends and removes the file that we have just opened; a third process may make and lock a new one."""
    path = tmp_path / "pack.lock"
    flock, opened = fcntl.flock, []

    def raced(handle: Any, how: int) -> None:
        if not opened:
            path.unlink()
            opened.append(open(path, "w"))  # noqa: SIM115 - held until the end of the test
            if third:
                flock(opened[0], fcntl.LOCK_EX)
        flock(handle, how)

    monkeypatch.setattr(lock_module.fcntl, "flock", raced)
    if third:
        with pytest.raises(ExpertFileError, match="another process"), pack_lock(tmp_path / "pack"):
            pass
        assert is_held(path)
    else:
        with pack_lock(tmp_path / "pack"):
            assert is_held(path), "the file that others will open is the one that is locked"
        assert not path.exists()
    opened[0].close()


def test_lock_ends_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(Stopped), pack_lock(tmp_path / "pack"):
        raise Stopped
    with pack_lock(tmp_path / "pack"):
        pass
    assert not list(tmp_path.iterdir())


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock_module.fcntl, "flock", refuse)
    with pytest.raises(RunLocalError, match="cannot lock files"), pack_lock(tmp_path / "pack"):
        pass


def test_packed_by_another_process_a_moment_ago(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(checkpoint)
    done, _ = write_pack(source, tmp_path / "pack")
    reads = watch_reads(source, monkeypatch)
    assert write_pack(source, tmp_path / "pack")[0] == done
    assert not reads
