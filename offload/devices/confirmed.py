"""Cards on which ``tests/gpu`` has found graphs to be right: a file in the cache folder. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from offload.paths import cache_folder


def confirmed_file() -> Path:
    return cache_folder() / "graphs.json"


def is_confirmed(card: str) -> bool:
    """Whether graphs were found right on ``card``, as :meth:`offload.devices.base.Device.card` names it."""
    return card in _read()


def confirm(card: str, figures: dict[str, Any]) -> Path:
    """Remember that they were, and what was measured. Returns the file."""
    path = confirmed_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_read() | {card: figures}, indent=1) + "\n", encoding="utf-8")
    return path


def withdraw(card: str) -> None:
    """They were found wrong."""
    found = _read()
    if found.pop(card, None) is not None:
        confirmed_file().write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _read() -> dict[str, Any]:
    try:
        found = json.loads(confirmed_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
