"""The command line of run-local: parse flags, call one function. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from offload.config import DEFAULT_POLICY, DEFAULT_SCOPE, format_size
from offload.errors import UsageError
from offload.host import LocalHost, write_stats
from tui.bench import given_flags, read_text
from tui.command_line import Command, command_line, flag_values, shared_flags
from tui.failures import ExitCode, run_guarded
from tui.flags import (
    FlagValues,
    whole,
)
from tui.libraries import hub_is_offline, prepare_libraries
from tui.outputs import check_outputs
from tui.question import read_question
from tui.saved import find_saved, is_full_terminal, list_saved
from tui.text import check_text

if TYPE_CHECKING:
    from offload.config import EngineSettings, SamplingSettings
    from offload.protocol import ChatEngine
    from tui.screen import Screen


def build_parser() -> argparse.ArgumentParser:
    """See :func:`tui.command_line.command_line`."""
    return command_line(_COMMANDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own). Returns the exit code and raises nothing."""
    return run_guarded(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = build_parser().parse_args(given or ["chat"])
    values = flag_values(arguments)
    if hub_is_offline(os.environ):
        values.given.setdefault("offline", True)
    command: Command = arguments.run
    try:
        return command(arguments, values)
    except UsageError as error:
        raise UsageError(values.blame(str(error))) from error


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
                    on_notice=lambda notice: screen.note(notice.text),
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
        return read(parsed, flag_values(parsed))[:2]

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
    from tui.screen import Screen
    from tui.tables import table

    screen = Screen()
    if arguments.families:
        from offload.catalogue import load_catalogue

        catalogue = load_catalogue()
        screen.answer(table(catalogue.rows()))
        for note in catalogue.notes():
            screen.note(note)
        return ExitCode.DONE

    from offload.checkpoint.library import list_packs, remove_pack

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


def _doctor(arguments: argparse.Namespace, values: FlagValues) -> int:
    prepare_libraries(hub_is_offline(os.environ))

    from itertools import chain

    from offload.doctor import examine
    from tui.doctor import examine_front_end, finding_lines, findings_json, verdict
    from tui.screen import Screen

    screen, findings = Screen(), []
    for finding in chain(examine_front_end(shared_flags(), tuple(_COMMANDS), os.environ), examine()):
        findings.append(finding)
        if not arguments.json:
            screen.answer(finding_lines(finding))
    if arguments.json:
        screen.answer(findings_json(findings))
    screen.note(verdict(findings))
    return ExitCode.FAILED if any(finding.state == "problem" for finding in findings) else ExitCode.DONE


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


_COMMANDS: dict[str, Command] = {
    "chat": _chat,
    "batch": _batch,
    "plan": _plan,
    "pack": _pack,
    "bench": _bench,
    "models": _models,
    "trace": _trace,
    "tune": _tune,
    "doctor": _doctor,
    "config": _config,
    "completion": _completion,
}


if __name__ == "__main__":
    sys.exit(main())
