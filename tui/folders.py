"""Where the front ends keep their few files. Nothing is ever written straight into the home folder."""

from __future__ import annotations

import os
from pathlib import Path


def state_folder() -> Path | None:
    """``$XDG_STATE_HOME/run-local`` or ``~/.local/state/run-local``; not created. None for a user without a home."""
    return _folder("XDG_STATE_HOME", ".local/state")


def config_folder() -> Path | None:
    """``$XDG_CONFIG_HOME/run-local`` or ``~/.config/run-local``; not created. None for a user without a home."""
    return _folder("XDG_CONFIG_HOME", ".config")


def _folder(variable: str, usual: str) -> Path | None:
    given = os.environ.get(variable, "")
    if os.path.isabs(given):  # the XDG rules say to ignore a relative path
        return Path(given) / "run-local"
    try:
        return Path.home() / usual / "run-local"
    except RuntimeError:
        return None
