"""``doctor``: the findings of the engine's side, those about terminal and settings, and how both are shown."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from offload.errors import UsageError
from offload.events import Finding
from tui.config_file import preset_names, read_config, read_preset
from tui.flags import Flag, FlagValues, KeptFlags
from tui.folders import config_folder, state_folder
from tui.saved import is_full_terminal
from tui.store import conversations_folder
from tui.text import one_line

_MARKS = {"ok": "ok", "note": "note", "problem": "PROBLEM"}
_OWN_VARIABLES = ("RUN_LOCAL_CACHE", "RUN_LOCAL_DEBUG", "RUN_LOCAL_DEMO")
_SMALLEST = (80, 24)


def examine_front_end(flags: Sequence[Flag], commands: Sequence[str], environ: Mapping[str, str]) -> Iterator[Finding]:
    """Settings, folders and terminal."""
    yield from _settings(flags, commands)
    yield from _variables(flags, environ)
    yield from _folders()
    yield _terminal(environ)


def finding_lines(finding: Finding) -> str:
    """A line, and one below with the remedy."""
    text = f"{_MARKS[finding.state]:<7}  {finding.area:<9}  {one_line(finding.text)}\n"
    return text + (f"{'':<20}do: {one_line(finding.remedy)}\n" if finding.remedy else "")


def verdict(findings: Iterable[Finding]) -> str:
    states = [finding.state for finding in findings]
    problems, notes = states.count("problem"), states.count("note")
    return f"{problems or 'no'} problem{'' if problems == 1 else 's'}, {notes or 'no'} note{'' if notes == 1 else 's'}"


def findings_json(findings: Iterable[Finding]) -> str:
    rows = [{"area": one.area, "state": one.state, "text": one.text, "remedy": one.remedy or None} for one in findings]
    return json.dumps({"findings": rows}, ensure_ascii=False, indent=2) + "\n"


def _settings(flags: Sequence[Flag], commands: Sequence[str]) -> Iterator[Finding]:
    known = [flag.dest for flag in flags]
    try:
        _check(flags, read_config("chat", commands, known))
    except UsageError as error:
        yield Finding("settings", "problem", str(error), "mend the file; every command stops there")
    else:
        folder = config_folder()
        there = folder is not None and (folder / "config.toml").exists()
        yield Finding("settings", "ok", f"{folder}/config.toml is read" if there else "there is no config.toml")
    for name in preset_names():
        try:
            _check(flags, read_preset(name, known))
        except UsageError as error:
            yield Finding("settings", "note", str(error), f"mend the file; until then --preset {name} is an error")


def _check(flags: Sequence[Flag], kept: KeptFlags) -> None:
    """Raises UsageError for a value that makes no sense."""
    given = {
        one.dest: one.read(list(kept.texts[one.dest]), kept.named(one.dest)) for one in flags if one.dest in kept.texts
    }
    values = FlagValues(given, {one.name: kept.named(one.dest) for one in flags})
    try:
        values.engine()
        values.sampling()
    except UsageError as error:
        raise UsageError(values.blame(str(error))) from error


def _variables(flags: Sequence[Flag], environ: Mapping[str, str]) -> Iterator[Finding]:
    known = {flag.variable: flag for flag in flags}
    for name in sorted(environ):
        if not name.startswith("RUN_LOCAL_") or name in _OWN_VARIABLES:
            continue
        if name not in known:
            close = get_close_matches(name, [*known, *_OWN_VARIABLES], 1)
            hint = f"did you mean {close[0]}?" if close else "run-local config show lists the flags"
            yield Finding("settings", "note", f"nothing reads the variable {name}", hint)
        elif environ[name]:
            try:
                _check([known[name]], _Variable(name, {known[name].dest: [environ[name]]}))
            except UsageError as error:
                yield Finding("settings", "problem", str(error), f"unset {name}")


@dataclass(frozen=True, slots=True)
class _Variable:
    """One flag that the environment holds, as :class:`tui.flags.KeptFlags`."""

    name: str
    texts: Mapping[str, list[str]]

    def named(self, dest: str) -> str:
        return self.name


def _folders() -> Iterator[Finding]:
    for what, folder in (("conversations", conversations_folder()), ("reports", state_folder())):
        if folder is None:
            yield Finding("folders", "note", f"there is no folder for {what}: this user has no home", "set HOME")
        elif not _can_be_written(folder):
            yield Finding("folders", "note", f"{folder} cannot be written: no {what} are kept", "make it writable")


def _can_be_written(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _terminal(environ: Mapping[str, str]) -> Finding:
    if not is_full_terminal(environ):
        return Finding("terminal", "ok", "no terminal that a screen could be drawn on; chat is plain")
    width, height = shutil.get_terminal_size()
    colours = "no colours (NO_COLOR)" if environ.get("NO_COLOR") else environ.get("COLORTERM") or "256 colours at most"
    text = f"{environ.get('TERM')}, {width}x{height}, {colours}"
    if width < _SMALLEST[0] or height < _SMALLEST[1]:
        return Finding("terminal", "note", text, f"the chat is made for {_SMALLEST[0]}x{_SMALLEST[1]} and more")
    if "utf" not in (sys.stdout.encoding or "").lower():
        return Finding("terminal", "note", f"{text}, {sys.stdout.encoding}", "a UTF-8 locale: export LANG=C.UTF-8")
    return Finding("terminal", "ok", text)
