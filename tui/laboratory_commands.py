"""The commands ``trace`` and ``tune`` as a user meets them; the work is done by modules that are handed in."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.errors import UsageError
from tui.config_file import preset_path, save_preset
from tui.failures import ExitCode
from tui.progress import LoadReporter
from tui.screen import Screen
from tui.svg import curves_svg
from tui.trace_view import trace_text
from tui.tune_view import advice_text, tune_curves, tune_text


def run_trace(arguments: argparse.Namespace, work: Any, screen: Screen) -> int:
    """One of the commands below ``trace``; ``work`` is ``offload.laboratory.traces``."""
    _TRACE_COMMANDS[arguments.action](arguments, work, screen)
    return ExitCode.DONE


def _info(arguments: argparse.Namespace, work: Any, screen: Screen) -> None:
    found = [work.describe(file, arguments.recall) for file in arguments.files]
    if arguments.json:
        screen.answer(json.dumps(found, ensure_ascii=False, allow_nan=False, indent=2) + "\n")
        return
    for number, one in enumerate(found):
        title = f"{one['file']}\n" if len(found) > 1 else ""
        screen.answer(("\n" if number else "") + title + trace_text(one))


def _convert(arguments: argparse.Namespace, work: Any, screen: Screen) -> None:
    if arguments.sort:
        given = [name for name in ("form", "model", "experts", "phase") if getattr(arguments, name) is not None]
        if given:
            raise UsageError(f"--sort and --{given[0]}: --sort is for traces, which say that themselves")
        screen.note(work.convert(arguments.files, arguments.output, sort=True))
    else:
        form, model, experts, phase = arguments.form, arguments.model, arguments.experts, arguments.phase
        screen.note(work.convert(arguments.files, arguments.output, form, model, experts, phase))
    screen.answer(f"{arguments.output}\n")


def _split(arguments: argparse.Namespace, work: Any, screen: Screen) -> None:
    screen.answer("".join(f"{name}\n" for name in work.split(arguments.file, arguments.output, arguments.folds)))


def _synth(arguments: argparse.Namespace, work: Any, screen: Screen) -> None:
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    for name in ("repeat", "overlap", "topic"):
        if name in given:
            given[name] = work.shares_by_layer(given[name], f"--{name}")
    screen.note(work.make(arguments.output, arguments.like, given))
    screen.answer(f"{arguments.output}\n")


_TRACE_COMMANDS = {"info": _info, "convert": _convert, "merge": _convert, "split": _split, "synth": _synth}


@dataclass(frozen=True, slots=True)
class TuneDefaults:
    """What chat would use: others are held against it."""

    policy: str
    scope: str


def run_tune(arguments: argparse.Namespace, work: Any, defaults: TuneDefaults, screen: Screen) -> int:
    """``tune``; ``work`` is ``offload.laboratory.tuning``."""
    preset = None if arguments.save is None else preset_path(arguments.save, "--save")
    if arguments.plot is not None and arguments.plot.suffix != ".svg":
        raise UsageError(
            f"--plot: {arguments.plot} does not end in .svg, the only form that is written; a browser shows it, and "
            "prints or converts it to others"
        )
    work.check_files([("--plot", arguments.plot), ("--csv", arguments.csv)])
    names = work.TuneRequest.__dataclass_fields__
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    request = work.TuneRequest(**given | {"traces": tuple(arguments.traces), "policy": tuple(arguments.policy or ())})
    with LoadReporter(screen) as report:
        tuned = work.run_tune(request, (defaults.policy, defaults.scope), report)
    found = tuned.to_json()
    for note in tuned.notes:
        screen.note(note)
    if arguments.csv is not None:
        _write(arguments.csv, work.table_of(tuned.result), "--csv")
    if arguments.plot is not None:
        picture = curves_svg(
            tune_curves(found)[:10],
            title=f"{found['model']}: hit rate by cache size",
            x_label="share of the experts that have a slot",
            y_label="hit rate",
        )
        _write(arguments.plot, picture, "--plot")
    if preset is not None:
        flags = work.keep_learned(tuned, preset.with_suffix(".npz"))
        save_preset(preset, flags, _remarks(arguments, found))
        screen.note(f"kept as preset {arguments.save} ({preset})")
    if arguments.json:
        screen.answer(json.dumps(found, ensure_ascii=False, allow_nan=False, indent=2) + "\n")
    else:
        screen.answer(f"{tune_text(found)}\n{advice_text(found)}{tuned.command()}\n")
    return ExitCode.DONE


def _remarks(arguments: argparse.Namespace, found: dict[str, Any]) -> Iterable[str]:
    yield f"run-local tune {' '.join(str(file) for file in arguments.traces)} --save {arguments.save}"
    yield advice_text(found)


def _write(path: Path, text: str, flag: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise UsageError(f"{flag}: {path} cannot be written ({error.strerror})") from error
