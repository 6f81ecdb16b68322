"""Files that a command writes at its end: found out at its start whether it can."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from offload.errors import UsageError
from tui.flags import FlagValues


def check_outputs(values: FlagValues) -> None:
    """Find out before a model is loaded that a report could not be written at the end. Raises UsageError."""
    seen: dict[Path, str] = {}
    for dest in ("stats_json", "trace_out", "cache_log"):
        path: Path | None = values.given.get(dest)
        if path is None:
            continue
        flag = "--" + dest.replace("_", "-")
        try:
            _try_to_write(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{flag}: {path} cannot be written ({reason})") from error
        other = seen.setdefault(path.resolve(), flag)
        if other != flag:
            raise UsageError(f"{flag}: {path} is the file of {other} too")


def _try_to_write(path: Path) -> None:
    if path.exists() and not path.is_file() and not path.is_dir():
        if not os.access(path, os.W_OK):  # opening a pipe to try it would end it for its reader
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return
    existed = path.exists()
    open(path, "ab").close()
    if not existed:
        path.unlink()
