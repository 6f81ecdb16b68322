"""The command line of run-local: parse flags, call one function. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from offload.config import DEFAULT_POLICY, DEFAULT_SCOPE, format_size
from offload.errors import UsageError
from offload.host import LocalHost, write_stats
from tui.bench import BENCH_SAMPLING_FLAGS, add_bench_flags, given_flags, read_text
from tui.config_file import kept_flags
from tui.failures import EXIT_CODES, ExitCode, run_guarded
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
    whole,
)
from tui.laboratory_flags import add_trace_commands, add_tune_flags
from tui.libraries import hub_is_offline, prepare_libraries
from tui.outputs import check_outputs
from tui.question import read_question
from tui.saved import add_saved_flags, find_saved, is_full_terminal, list_saved
from tui.text import check_text
from tui.version import VersionAction

if TYPE_CHECKING:
    from offload.config import EngineSettings, SamplingSettings
    from offload.protocol import ChatEngine
    from tui.screen import Screen

Command = Callable[[argparse.Namespace, FlagValues], int]
_COMMANDS = ("chat", "batch", "plan", "pack", "bench", "models", "trace", "tune", "config", "completion")

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


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. A parsed namespace has ``run`` (the command) and ``flags`` (its shared flags)."""
    parser = _Parser(
        prog="run-local",
        description="Run Mixture-of-Experts models whose experts stream from disk, under a hard memory budget.",
        epilog=f"{_ENVIRONMENT}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=VersionAction, nargs=0, help="print the version and leave")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)

    chat = _add_command(commands, "chat", _chat, "ask a model", ("model", "format", "memory", "run", "sampling"))
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
        commands, "batch", _batch, "answer a file of prompts", ("model", "format", "memory", "run", "sampling", "batch")
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

    plan = _add_command(commands, "plan", _plan, "show what memory a model would take", ("model", "format", "memory"))
    plan.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    plan.add_argument("--hardware", metavar="NAME", help="plan for this machine (rtx4060, or a file) and say how fast")

    pack = _add_command(commands, "pack", _pack, "write a model's experts to an expert file", ("model", "format"))
    pack.add_argument("-o", "--output", metavar="DIR", help="the pack's own folder (default: one in the packs folder)")

    bench = _add_command(
        commands, "bench", _bench, "measure speed and quality", ("model", "format", "memory", "run", "batch")
    )
    _add_flags(bench, "sampling", BENCH_SAMPLING_FLAGS)
    add_bench_flags(bench)

    models = _add_command(commands, "models", _models, "list or remove packs", ())
    _add_flags(models, "model", [flag for flag in MODEL_FLAGS if flag.name == "--experts-dir"])
    models.add_argument("--remove", metavar="NAME", help="delete the pack NAME")

    trace = _add_command(commands, "trace", _trace, "look at routing traces, convert and make them", ())
    add_trace_commands(_nested(trace, "trace", _trace))
    add_tune_flags(_add_command(commands, "tune", _tune, "find the policy and the cache size for your traces", ()))

    config = _add_command(commands, "config", _config, "show the settings", ())
    show = _nested(config, "config", _config)("show", "show every flag, its value and where that comes from")
    for group, flags in _FLAG_GROUPS.items():
        _add_flags(show, group, flags)
    show.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    completion = _add_command(commands, "completion", _completion, "print what a shell needs to complete this", ())
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell: bash, zsh or fish")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own). Returns the exit code and raises nothing."""
    return run_guarded(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = build_parser().parse_args(given or ["chat"])
    values = _values(arguments)
    if hub_is_offline(os.environ):
        values.given.setdefault("offline", True)
    command: Command = arguments.run
    try:
        return command(arguments, values)
    except UsageError as error:
        raise UsageError(values.blame(str(error))) from error


def _values(arguments: argparse.Namespace) -> FlagValues:
    """The shared flags of a command, from the command line, the environment, the preset and the file."""
    if not arguments.flags:
        return FlagValues({})
    known = [flag.dest for group in _FLAG_GROUPS.values() for flag in group]
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


def _chat(arguments: argparse.Namespace, values: FlagValues) -> int:
    settings, sampling = values.engine(), values.sampling()
    if arguments.list:
        from tui.screen import Screen

        Screen().answer(list_saved())
        return ExitCode.DONE
    check_outputs(values)
    question = read_question(arguments.question)
    system = check_text(arguments.system or "", "--system") or None
    saved = find_saved(arguments)
    if question is None and not arguments.plain and is_full_terminal(os.environ):
        from tui.app.run import ChatRequest, run_app

        prepare_libraries(settings.offline)
        host = LocalHost(values.given.get("stats_json"), settings.experts_dir)
        return run_app(host, ChatRequest(settings, sampling, system, saved))

    from tui.plain import PlainChat
    from tui.prompt import terminal_reader
    from tui.saved import plain_session
    from tui.screen import Screen

    screen = Screen()
    with (
        closing(plain_session(saved, sampling, system, screen.problem)) as session,
        _open_engine(settings, values, screen) as engine,
    ):
        chat = PlainChat(engine, screen, sampling, session=session)
        return chat.talk(terminal_reader(screen)) if question is None else chat.answer_once(question)


def _batch(arguments: argparse.Namespace, values: FlagValues) -> int:
    from offload.generation.batch_job import open_job
    from offload.generation.batch_run import run_batch
    from tui.interrupts import FinishOnInterrupt
    from tui.progress import BatchReporter
    from tui.screen import Screen

    settings, sampling = values.engine(), values.sampling()
    most_errors = None if arguments.max_errors is None else whole(arguments.max_errors, "--max-errors")
    check_outputs(values)
    job = open_job(arguments.input, arguments.output, sampling, arguments.resume, arguments.ordered, most_errors)
    settings = job.engine_settings(settings, values.given.get("batch_size"))
    screen = Screen()
    try:
        with job.open_sink(settings) as sink:
            if job.total == sink.done.total():
                sink.finish()
                screen.note(f"nothing to do: all {job.total} rows are done" if job.total else "nothing to do: no rows")
                return ExitCode.DONE
            further: dict[str, object] = {}
            with (
                _open_engine(settings, values, screen, further) as engine,
                BatchReporter(screen, answers_on_stdout=job.path is None) as report,
                FinishOnInterrupt(engine, screen.note) as interrupts,
            ):
                summary = run_batch(
                    engine,
                    job.source.lines(),
                    sink,
                    sampling,
                    job.seed,
                    options=job.options,
                    done_before=sink.done,
                    rows_total=job.total,
                    on_progress=report,
                    should_stop=lambda: interrupts.interrupted,
                    should_cancel=lambda: interrupts.cancelled,
                )
                further["batch"] = summary.to_json()
            screen.note(summary.describe())
            if summary.interrupted:
                raise KeyboardInterrupt
            sink.finish()
    except KeyboardInterrupt:
        if job.can_resume:
            screen.note("go on with the same command and --resume")
        raise
    return ExitCode.FAILED if summary.failed else ExitCode.DONE


def _plan(arguments: argparse.Namespace, values: FlagValues) -> int:
    settings = values.engine()
    prepare_libraries(settings.offline)

    from tui.progress import LoadReporter
    from tui.screen import Screen
    from tui.tables import table

    screen = Screen()
    with LoadReporter(screen) as report:
        from offload.engine import plan_model

        plan = plan_model(settings, report, arguments.hardware)
    if arguments.json:
        screen.answer(json.dumps(plan.to_json(), ensure_ascii=False, indent=2) + "\n")
    else:
        rows = [(label, format_size(size), remark) for label, size, remark in plan.rows()]
        screen.answer("".join(f"{line}\n" for line in plan.summary()) + "\n" + table(rows, right=(1,)))
    return ExitCode.DONE


def _pack(arguments: argparse.Namespace, values: FlagValues) -> int:
    settings = values.engine()
    output = Path(arguments.output) if arguments.output else None
    prepare_libraries(settings.offline)

    from tui.progress import LoadReporter
    from tui.screen import Screen
    from tui.tables import by_layer

    screen = Screen()
    with LoadReporter(screen) as report:
        from offload.checkpoint.library import pack_model

        pack = pack_model(settings, report, output)
    screen.note(f"{pack.name}: {pack.experts} experts, {format_size(pack.bytes)}")
    if pack.errors:
        screen.note("error of the quantised weights relative to the weights (root mean squares):")
        screen.note(by_layer(pack.errors).rstrip("\n"))
    screen.answer(f"{pack.folder}\n")
    return ExitCode.DONE


def _bench(arguments: argparse.Namespace, values: FlagValues) -> int:
    from offload.bench.command import Host, run_bench
    from offload.bench.request import BenchRequest
    from tui.progress import LoadReporter
    from tui.screen import Screen
    from tui.tables import table

    def read(parsed: argparse.Namespace, found: FlagValues) -> tuple[BenchRequest, EngineSettings, SamplingSettings]:
        given = {name: getattr(parsed, name) for name in BenchRequest.field_names()}
        asked = BenchRequest(**given | {"compare": tuple(parsed.compare or ())})
        return asked, replace(found.engine(), row_tokens=asked.workload.total), found.sampling()

    def read_command_line(flags: list[str]) -> tuple[BenchRequest, EngineSettings]:
        parsed = build_parser().parse_args(["bench", *flags])
        return read(parsed, _values(parsed))[:2]

    request, settings, sampling = read(arguments, values)
    text = read_text(request.perplexity) if request.perplexity is not None else None
    if not request.compare:
        check_outputs(values)
        prepare_libraries(settings.offline)
    screen = Screen()
    with LoadReporter(screen) as report:
        host = Host(
            settings=settings,
            sampling=sampling,
            open_engine=lambda: _open_engine(settings, values, screen),
            read_flags=read_command_line,
            command=[*_own_command(), "bench"],
            given=given_flags(arguments, arguments.flags),
            on_event=report,
        )
        result = run_bench(request, text, host)
    if arguments.json:
        screen.answer(json.dumps(result.to_json(), ensure_ascii=False, allow_nan=False, indent=2) + "\n")
    else:
        lines = "".join(f"{line}\n" for line in result.summary())
        screen.answer((lines and lines + "\n") + table(result.rows(), right=result.right))
    return ExitCode.DONE


def _own_command() -> list[str]:
    return [sys.executable, str(Path(__file__).resolve())]


def _models(arguments: argparse.Namespace, values: FlagValues) -> int:
    from offload.checkpoint.library import list_packs, remove_pack
    from tui.screen import Screen
    from tui.tables import table

    screen = Screen()
    root: Path | None = values.given.get("experts_dir")
    if arguments.remove is not None:
        removed = remove_pack(arguments.remove, root)
        screen.note(f"removed {removed.name} ({format_size(removed.bytes)})")
        return ExitCode.DONE
    packs = list_packs(root)
    if not packs:
        screen.note(f"there are no packs in {root}" if root else "there are no packs yet")
        return ExitCode.DONE
    rows = [("NAME", "SIZE", "FORMAT", "EXPERTS", "MODEL", "FOLDER")]
    for pack in packs:
        model = pack.model + (f"@{pack.revision}" if pack.revision else "")
        state = "" if pack.complete else " (incomplete)"
        rows.append(
            (pack.name, format_size(pack.bytes), pack.format, str(pack.experts), model, f"{pack.folder}{state}")
        )
    screen.answer(table(rows, right=(1, 3)))
    return ExitCode.DONE


def _completion(arguments: argparse.Namespace, values: FlagValues) -> int:
    from tui.completion import SHELLS, read_parser

    sys.stdout.write(SHELLS[arguments.shell](read_parser(build_parser())))
    return ExitCode.DONE


def _trace(arguments: argparse.Namespace, values: FlagValues) -> int:
    from offload.laboratory import traces
    from tui.laboratory_commands import run_trace
    from tui.screen import Screen

    return run_trace(arguments, traces, Screen())


def _tune(arguments: argparse.Namespace, values: FlagValues) -> int:
    from offload.laboratory import tuning
    from tui.laboratory_commands import TuneDefaults, run_tune
    from tui.screen import Screen

    return run_tune(arguments, tuning, TuneDefaults(DEFAULT_POLICY, DEFAULT_SCOPE), Screen())


def _config(arguments: argparse.Namespace, values: FlagValues) -> int:
    from tui.config_view import config_json, config_rows, config_text
    from tui.screen import Screen

    rows = config_rows(values, arguments.flags)
    Screen().answer(config_json(rows) if arguments.json else config_text(rows))
    return ExitCode.DONE


@contextmanager
def _open_engine(
    settings: EngineSettings, values: FlagValues, screen: Screen, further: Mapping[str, object] | None = None
) -> Iterator[ChatEngine]:
    """The engine of ``chat`` and ``batch``; writes ``--stats-json`` at the end, after Ctrl-C or an error too, with what
    ``further`` holds then.
    """
    prepare_libraries(settings.offline)

    from tui.progress import LoadReporter

    with LoadReporter(screen) as report:
        from offload.engine import open_engine

        opened = open_engine(settings, report)
    with closing(opened) as engine:
        try:
            yield engine
        finally:
            write_stats(engine, values.given.get("stats_json"), further)


if __name__ == "__main__":
    sys.exit(main())
