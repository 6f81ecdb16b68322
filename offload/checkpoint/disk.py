"""Writing large files: enough space first, errors that name the remedy, names that survive a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from offload.config import format_size
from offload.errors import ExpertFileError

SPARE_BYTES = 64 * 2**20  # what a pack leaves free on the disk


def check_space(root: Path, size: int) -> None:
    """Raises ExpertFileError unless ``size`` bytes more, and some spare, fit on the disk of the folder ``root``."""
    needed = size + SPARE_BYTES
    free = shutil.disk_usage(root).free
    if free < needed:
        raise ExpertFileError(
            f"{root}: packing needs {format_size(needed)} but only {format_size(free)} are free; "
            "free some space or choose another disk with --experts-dir"
        )


@contextlib.contextmanager
def disk_errors(root: Path, target: Path, resumes: str = "") -> Iterator[None]:
    """Turns the system's errors while ``target`` is written below ``root`` into ExpertFileError.

    ``resumes`` says what becomes of the part that is written when the same command runs again.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExpertFileError(
                f"{root}: the disk is full; free some space and run the same command again{resumes}"
            ) from error
        raise ExpertFileError(f"{error.filename or target}: the pack cannot be written ({error.strerror})") from error


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``, in as many steps as the system takes."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def sync_folder(folder: Path) -> None:
    """Make names in ``folder`` survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
