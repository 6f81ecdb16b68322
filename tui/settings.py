"""Keys and looks from the user's ``config.toml``: its tables ``[keys]`` and ``[tui]``. Other tables are others'."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offload.errors import UsageError
from tui.actions import BY_NAME
from tui.folders import config_folder

THEMES = ("auto", "dark", "light", "ansi-dark", "ansi-light")


@dataclass(frozen=True, slots=True)
class LookSettings:
    """``keys``: action -> its keys, comma-separated, as the user wants them. ``panel``, ``map``: shown at the start."""

    theme: str = "auto"
    panel: bool = True
    map: bool = True
    keys: Mapping[str, str] = field(default_factory=dict)


def config_file() -> Path | None:
    """``$XDG_CONFIG_HOME/run-local/config.toml`` or that below ``~/.config``. None for a user without a home."""
    folder = config_folder()
    return None if folder is None else folder / "config.toml"


def read_look(file: Path | None) -> LookSettings:
    """What ``file`` says about keys and looks; the defaults where it says nothing or does not exist.

    Raises UsageError naming the file and the entry for what makes no sense.
    """
    if file is None or not file.exists():
        return LookSettings()
    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    look, keys = (_table(content, name, file) for name in ("tui", "keys"))
    for name in look.keys() - {"theme", "panel", "map"}:
        raise UsageError(f"{file}: [tui] has no '{name}'; there are theme, panel and map")
    theme = look.get("theme", "auto")
    if theme not in THEMES:
        raise UsageError(f"{file}: [tui] theme '{theme}' is not one of {', '.join(THEMES)}")
    for name in ("panel", "map"):
        if not isinstance(look.get(name, True), bool):
            raise UsageError(f"{file}: [tui] {name} must be true or false")
    return LookSettings(theme, look.get("panel", True), look.get("map", True), _read_keys(keys, file))


def _table(content: dict[str, Any], name: str, file: Path) -> dict[str, Any]:
    table = content.get(name, {})
    if not isinstance(table, dict):
        raise UsageError(f"{file}: [{name}] must be a table")
    return table


def _read_keys(table: dict[str, Any], file: Path) -> dict[str, str]:
    keys: dict[str, str] = {}
    for name, value in table.items():
        if name not in BY_NAME:
            raise UsageError(f"{file}: [keys] there is no action '{name}'; there are {', '.join(sorted(BY_NAME))}")
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, list) or not parts or not all(isinstance(part, str) and part for part in parts):
            raise UsageError(f'{file}: [keys] {name} must be a key such as "ctrl+x", or a list of keys')
        keys[name] = ",".join(part.strip().lower() for part in parts)
    taken: dict[str, str] = {}
    for name in BY_NAME:
        for key in keys.get(name, ",".join(BY_NAME[name].keys)).split(","):
            if not key:
                continue
            other = taken.setdefault(key, name)
            if other != name and (name in keys or other in keys):
                raise UsageError(f"{file}: [keys] {key} would mean both {other} and {name}")
    return keys
