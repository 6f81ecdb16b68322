"""The grammar of the command line: which commands there are, and which flags each takes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from offload.errors import UsageError
from tui.bench import BENCH_SAMPLING_FLAGS, add_bench_flags
from tui.config_file import kept_flags
from tui.failures import EXIT_CODES
from tui.flags import (
    BATCH_FLAGS,
    FORMAT_FLAGS,
    MEMORY_FLAGS,
    MODEL_FLAGS,
    RUN_FLAGS,
    SAMPLING_FLAGS,
    Flag,
    FlagValues,
    read_flags,
)
from tui.laboratory_flags import add_trace_commands, add_tune_flags
from tui.saved import add_saved_flags
from tui.version import VersionAction

Command = Callable[[argparse.Namespace, FlagValues], int]
_COMMANDS = ("chat", "batch", "plan", "pack", "bench", "models", "trace", "tune", "doctor", "config", "completion")

_ENVIRONMENT = """\
Flags of the groups model, format, memory, run and sampling can also be set in the environment (--ctx is RUN_LOCAL_CTX),
by --preset, and in config.toml; a flag wins over its variable, that over the preset, that over the file. 'config show'
tells what holds. Answers go to stdout, everything else to stderr."""
_FLAG_GROUPS = {
    "model": MODEL_FLAGS,
    "format": FORMAT_FLAGS,
    "memory": MEMORY_FLAGS,
    "run": RUN_FLAGS,
    "sampling": SAMPLING_FLAGS,
    "batch": BATCH_FLAGS,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def command_line(run: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The whole command line. A parsed namespace has ``run``, a command's function, and ``flags``, its shared flags."""
    parser = _Parser(
        prog="run-local",
        description="Run Mixture-of-Experts models whose experts stream from disk, under a hard memory budget.",
        epilog=f"{_ENVIRONMENT}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=VersionAction, nargs=0, help="print the version and leave")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)

    chat = _add_command(commands, "chat", run["chat"], "ask a model", ("model", "format", "memory", "run", "sampling"))
    chat.add_argument(
        "question",
        nargs="?",
        metavar="QUESTION",
        help="answer this and leave, instead of chatting; what comes on standard input is put after it",
    )
    chat.add_argument("--system", metavar="TEXT", help="system prompt (default: none, or the chat template's own)")
    chat.add_argument("--plain", action="store_true", help="the plain console, as also where there is no terminal")
    add_saved_flags(chat)

    batch = _add_command(
        commands,
        "batch",
        run["batch"],
        "answer a file of prompts",
        ("model", "format", "memory", "run", "sampling", "batch"),
    )
    batch.add_argument(
        "input", metavar="IN.jsonl", help="rows {id, prompt} or {id, messages}, maybe gzip; - is standard input"
    )
    batch.add_argument(
        "-o", "--output", required=True, metavar="OUT.jsonl", help="new file for the answers; - is standard output"
    )
    batch.add_argument("--resume", action="store_true", help="go on with OUT.jsonl: skip the rows that it has")
    batch.add_argument("--ordered", action="store_true", help="write the answers in the order of the input")
    batch.add_argument("--max-errors", metavar="N", help="begin no more rows after N with an error (default: go on)")

    plan = _add_command(
        commands, "plan", run["plan"], "show what memory a model would take", ("model", "format", "memory")
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    plan.add_argument("--hardware", metavar="NAME", help="plan for this machine (rtx4060, or a file) and say how fast")

    pack = _add_command(commands, "pack", run["pack"], "write a model's experts to an expert file", ("model", "format"))
    pack.add_argument("-o", "--output", metavar="DIR", help="the pack's own folder (default: one in the packs folder)")

    bench = _add_command(
        commands, "bench", run["bench"], "measure speed and quality", ("model", "format", "memory", "run", "batch")
    )
    _add_flags(bench, "sampling", BENCH_SAMPLING_FLAGS)
    add_bench_flags(bench)

    models = _add_command(commands, "models", run["models"], "list or remove packs; show which families run", ())
    _add_flags(models, "model", [flag for flag in MODEL_FLAGS if flag.name == "--experts-dir"])
    instead = models.add_mutually_exclusive_group()
    instead.add_argument("--remove", metavar="NAME", help="delete the pack NAME")
    instead.add_argument("--families", action="store_true", help="show which families run, and how that was tested")

    trace = _add_command(commands, "trace", run["trace"], "look at routing traces, convert and make them", ())
    add_trace_commands(_nested(trace, "trace", run["trace"]))
    add_tune_flags(
        _add_command(commands, "tune", run["tune"], "find the policy and the cache size for your traces", ())
    )

    doctor = _add_command(commands, "doctor", run["doctor"], "look at what this machine can do and what is wrong", ())
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of the lines")

    config = _add_command(commands, "config", run["config"], "show the settings", ())
    show = _nested(config, "config", run["config"])("show", "show every flag, its value and where that comes from")
    for group, flags in _FLAG_GROUPS.items():
        _add_flags(show, group, flags)
    show.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    completion = _add_command(
        commands, "completion", run["completion"], "print what a shell needs to complete this", ()
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell: bash, zsh or fish")
    return parser


def shared_flags() -> list[Flag]:
    """Every flag that commands share."""
    return [flag for group in _FLAG_GROUPS.values() for flag in group]


def flag_values(arguments: argparse.Namespace) -> FlagValues:
    """The shared flags of a command, from the command line, the environment, the preset and the file."""
    if not arguments.flags:
        return FlagValues({})
    known = [flag.dest for flag in shared_flags()]
    kept = kept_flags(getattr(arguments, "preset", None), arguments.command, _COMMANDS, known, os.environ)
    return read_flags(arguments, arguments.flags, os.environ, kept)


def _add_command(
    commands: argparse._SubParsersAction[_Parser], name: str, run: Command, summary: str, groups: Sequence[str]
) -> _Parser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"{_ENVIRONMENT}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, flags=[], command=name)
    for group in groups:
        _add_flags(parser, group, _FLAG_GROUPS[group])
    return parser


def _nested(parser: _Parser, command: str, run: Command) -> Callable[[str, str], _Parser]:
    """What adds commands below ``command``."""
    below = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    def add(name: str, summary: str) -> _Parser:
        added = _add_command(below, name, run, summary, ())
        added.set_defaults(command=command, action=name)
        return added

    return add


def _add_flags(parser: argparse.ArgumentParser, title: str, flags: Sequence[Flag]) -> None:
    group = parser.add_argument_group(title)
    for flag in flags:
        flag.add_to(group)
    parser.set_defaults(flags=[*parser.get_default("flags"), *flags])
