"""One packer at a time: a lock file beside the pack. Standard library only."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from offload.errors import ExpertFileError, RunLocalError


@contextlib.contextmanager
def pack_lock(folder: Path) -> Iterator[None]:
    """Hold ``NAME.lock`` beside the pack ``folder``. The system lets go of it when the process ends, however it ends.

    Creates the folder that both stand in. Raises ExpertFileError at once if another process holds the lock, and
    RunLocalError if the file cannot be written.
    """
    path = folder.with_name(folder.name + ".lock")
    with _locked(path, folder):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # nobody else can hold it: see _locked


def _locked(path: Path, folder: Path) -> TextIO:
    """An open handle that holds the lock on the file that ``path`` names now.

    Whoever opens the file just before its holder removes it gets a lock on a file that has no name any more, while the
    next process makes a new one and locks that: two holders. So the lock counts only if the name still leads to it.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = open(path, "w", encoding="utf-8")  # noqa: SIM115 - returned
        except OSError as error:
            raise RunLocalError(
                f"{path}: cannot be written ({error.strerror}); choose another folder with --experts-dir"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise ExpertFileError(
                f"{folder}: another process is packing this model now; wait until it is done and try again"
            ) from None
        except OSError as error:
            handle.close()
            raise RunLocalError(
                f"{path}: this file system cannot lock files ({error.strerror}); choose another folder with "
                "--experts-dir"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), os.stat(path)):
                return handle
        handle.close()
