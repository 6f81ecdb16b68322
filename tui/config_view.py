"""``config show``: every flag, its value, and where that comes from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from offload.config import EngineSettings, SamplingSettings
from tui.config_file import preset_names
from tui.flags import ENGINE_FIELDS, Flag, FlagValues
from tui.folders import config_folder
from tui.tables import table


def config_rows(values: FlagValues, flags: Iterable[Flag]) -> list[dict[str, Any]]:
    """One entry a flag: ``flag``, ``value`` (None: automatic) and ``source``. Raises UsageError for a bad value."""
    defaults = (values.engine() and EngineSettings(), values.sampling() and SamplingSettings())
    rows = []
    for flag in flags:
        if flag.dest in values.given:
            value, source = values.given[flag.dest], values.sources.get(flag.name, "flag")
        else:
            field = ENGINE_FIELDS.get(flag.dest, flag.dest)
            value = next((getattr(one, field) for one in defaults if hasattr(one, field)), None)
            source = "default"
        if isinstance(value, Path):
            value = str(value)
        rows.append({"flag": flag.name, "value": value, "source": source})
    return rows


def config_text(rows: list[dict[str, Any]]) -> str:
    lines = [("FLAG", "VALUE", "SOURCE"), *((row["flag"], _shown(row["value"]), row["source"]) for row in rows)]
    folder = config_folder()
    where = "there is no home folder" if folder is None else f"{folder / 'config.toml'}{_missing(folder)}"
    return table(lines) + f"\nfile: {where}\npresets: {', '.join(preset_names()) or 'none'}\n"


def config_json(rows: list[dict[str, Any]]) -> str:
    folder = config_folder()
    file = None if folder is None else str(folder / "config.toml")
    return json.dumps({"file": file, "presets": preset_names(), "flags": rows}, ensure_ascii=False, indent=2) + "\n"


def _missing(folder: Path) -> str:
    return "" if (folder / "config.toml").exists() else " (does not exist)"


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
