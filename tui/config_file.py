"""Flags that the user keeps in files: ``config.toml`` and presets, in the configuration folder.

Both are TOML with a key for each flag, named like it (``max-new-tokens`` or ``max_new_tokens``). In ``config.toml`` a
table named after a command holds for that command alone; ``[keys]`` and ``[tui]`` belong to the chat's screen.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from offload.errors import UsageError
from tui.folders import config_folder

SCREEN_TABLES = ("keys", "tui")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Kept:
    """Flags from one file: their texts by ``dest``, and how messages name the file."""

    source: str
    texts: Mapping[str, list[str]]

    def named(self, dest: str) -> str:
        """How to name one of the flags in a message."""
        return f"{dest.replace('_', '-')} in {self.source}"


def read_config(command: str, commands: Iterable[str], known: Iterable[str]) -> Kept:
    """What ``config.toml`` says for ``command``; nothing where there is no such file.

    ``commands`` are the tables that may occur, ``known`` the ``dest`` of all flags there are. Raises UsageError naming
    the file.
    """
    folder = config_folder()
    path = None if folder is None else folder / "config.toml"
    if path is None or not path.exists():
        return Kept("config.toml", {})
    content = _parse(path)
    texts: dict[str, list[str]] = {}
    known = set(known)
    tables = {name: value for name, value in content.items() if isinstance(value, dict)}
    for name in tables.keys() - set(commands) - set(SCREEN_TABLES):
        raise UsageError(f"{path}: there is no table [{name}]; there are {', '.join([*commands, *SCREEN_TABLES])}")
    plain = {name: value for name, value in content.items() if name not in tables}
    for values in (plain, *(tables[name] for name in tables if name not in SCREEN_TABLES)):
        _texts(path, values, known)  # a mistake is said, whatever command runs
    for values in (plain, tables.get(command, {})):
        texts |= _texts(path, values, known)
    return Kept(str(path), texts)


def read_preset(name: str, known: Iterable[str], source: str = "--preset") -> Kept:
    """The flags of a preset. Raises UsageError, naming ``source``, for one that does not exist or makes no sense."""
    path = preset_path(name, source)
    if not path.exists():
        have = ", ".join(preset_names()) or "none yet: run-local tune --save NAME makes one"
        raise UsageError(f"{source}: there is no preset '{name}'; there are {have}")
    texts = _texts(path, _parse(path), set(known))
    if "preset" in texts:
        raise UsageError(f"{path}: a preset cannot name another one")
    return Kept(f"preset {name} ({path})", texts)


def kept_flags(
    given: str | None, command: str, commands: Iterable[str], known: Iterable[str], environ: Mapping[str, str]
) -> list[Kept]:
    """The preset if one is named (by flag, which is ``given``, by variable or in ``config.toml``), then that file.

    The first to name a flag decides. Raises UsageError.
    """
    known = list(known)
    config = read_config(command, commands, known)
    named = next(
        (
            (name, source)
            for name, source in (
                (given, "--preset"),
                (environ.get("RUN_LOCAL_PRESET"), "RUN_LOCAL_PRESET"),
                (next(iter(config.texts.get("preset", [])), None), config.named("preset")),
            )
            if name
        ),
        None,
    )
    return [config] if named is None else [read_preset(named[0], known, named[1]), config]


def preset_names() -> list[str]:
    folder = config_folder()
    if folder is None or not (folder / "presets").is_dir():
        return []
    return sorted(path.stem for path in (folder / "presets").glob("*.toml"))


def preset_path(name: str, source: str) -> Path:
    """The preset's file, whether or not it exists. Raises UsageError for a name that cannot be one."""
    folder = config_folder()
    if folder is None:
        raise UsageError(f"{source}: this user has no home folder; set XDG_CONFIG_HOME")
    if not _NAME.fullmatch(name):
        raise UsageError(f"{source}: '{name}' is no name for a preset; use letters, digits, '-', '_' and '.'")
    return folder / "presets" / f"{name}.toml"


def save_preset(path: Path, flags: Iterable[tuple[str, str]], remarks: Iterable[str]) -> None:
    """Write ``flags`` (``--policy``, ``lru``), atomically, with ``remarks`` above. Raises UsageError."""
    lines = [f"# {' '.join(remark.split())}" for remark in remarks]
    lines += [f"{flag.removeprefix('--')} = {json.dumps(value, ensure_ascii=False)}" for flag, value in flags]
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("\n".join(lines) + "\n", "utf-8")
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UsageError(f"--save: {path} cannot be written ({error.strerror})") from error


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not valid UTF-8 at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not TOML ({error}); mend it, or remove it to do without") from error


def _texts(path: Path, values: Mapping[str, Any], known: set[str]) -> dict[str, list[str]]:
    found = {}
    for name, value in values.items():
        dest = name.removeprefix("--").replace("-", "_")
        if dest not in known:
            close = get_close_matches(dest, known, 1)
            hint = f"; did you mean '{close[0].replace('_', '-')}'?" if close else "; run-local config show lists all"
            raise UsageError(f"{path}: there is no flag '{name}'{hint}")
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, str | int | float) for item in items):
            raise UsageError(f"{path}: {name} must be a text, a number or true or false")
        found[dest] = [_text(item) for item in items]
    return found


def _text(value: str | int | float) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return str(value)
