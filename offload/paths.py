"""Where this program keeps its files. Standard library only."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Folder for what can be made again (packs, the demo model): ``RUN_LOCAL_CACHE``, or the platform's own."""
    chosen = os.environ.get("RUN_LOCAL_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "run-local"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "run-local"


def packs_folder() -> Path:
    """Default root of the packs."""
    return cache_folder() / "packs"
