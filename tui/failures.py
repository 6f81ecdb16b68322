"""What a command leaves behind when it ends: exit codes, one line on stderr, reports of bugs, closed pipes."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from io import TextIOWrapper
from pathlib import Path

from offload.errors import RunLocalError
from tui.folders import state_folder
from tui.text import one_line


class ExitCode(IntEnum):
    DONE = 0
    FAILED = 1
    USAGE = 2
    INTERRUPTED = 130
    CLOSED_PIPE = 141  # 128 + SIGPIPE, as any program that the signal ends


EXIT_CODES = """\
exit codes:
  0    done
  1    failed: the model, a file, the memory or the generation
  2    usage: a flag, a value or an input that makes no sense
  130  interrupted with Ctrl-C
  141  whoever read the output closed it early (as in '| head -1')"""


_OWN = ("offload", "cache", "tui", "run_local")


def run_guarded(action: Callable[[], int]) -> int:
    """Run a command and turn whatever it raises into one line on stderr and an exit code.

    ``RUN_LOCAL_DEBUG=1`` in the environment also shows the traceback, of every failure.
    """
    open_missing_streams()
    try:
        code = action()
        _flush_stdout()
    except SystemExit as leave:  # argparse, after --help and --version
        code = leave.code if isinstance(leave.code, int) else ExitCode.DONE
    except BaseException as error:  # everything ends here, Ctrl-C included
        code = report(error)
    _leave_quietly()
    return int(code)


def report(error: BaseException) -> ExitCode | int:
    """Say on stderr what went wrong, and return the exit code for it."""
    with suppress(OSError):  # stderr may be the pipe that was closed
        if os.environ.get("RUN_LOCAL_DEBUG", "") not in ("", "0"):
            traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, BrokenPipeError):
        return ExitCode.CLOSED_PIPE
    if isinstance(error, KeyboardInterrupt):
        say("interrupted")
        return ExitCode.INTERRUPTED
    say(f"error: {describe_failure(error)}")
    return error.exit_code if isinstance(error, RunLocalError) else ExitCode.FAILED


def describe_failure(error: BaseException) -> str:
    """What went wrong, with the remedy, in a line. A bug's traceback goes to a report, which the line names."""
    if isinstance(error, RunLocalError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory; give a smaller --ram or --ctx, or close other programs"
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] not in _OWN:
        return f"the package '{error.name}' is not installed; install run-local again with what it depends on"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror} (details: {write_report(error)})"
    kind = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"this is a bug ({one_line(kind)[:200]}); please report it with {write_report(error)}"


def say(message: str) -> None:
    """One line on stderr, marked as the program's own. A closed stderr is no reason to fail."""
    with suppress(OSError):
        print(f"run-local: {one_line(message)}", file=sys.stderr, flush=True)


def write_report(error: BaseException) -> str:
    """Save the traceback for a bug report and say where: the state folder, or the temporary one.

    It holds no prompt and no answer: of the command line only the name of the command is kept.
    """
    lines = [
        f"command: {' '.join(sys.argv[1:2])}",
        f"python: {sys.version}",
        f"system: {platform.platform()}",
        "",
        *traceback.format_exception(error),
    ]
    name = f"failure-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    state = state_folder()
    for folder in ([state / "reports"] if state else []) + [Path(tempfile.gettempdir())]:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            # "x": the temporary folder belongs to everybody, and must not make us write through another's link
            with open(folder / name, "x", encoding="utf-8", errors="backslashreplace") as file:
                file.write("\n".join(lines))
            return str(folder / name)
    return "the traceback that RUN_LOCAL_DEBUG=1 shows"


def open_missing_streams() -> None:
    """Give closed standard streams (``>&-``) a harmless end, and let stdout replace what it cannot encode.

    Without the first, ``print(file=sys.stderr)`` would write to stdout, and the next file to be opened would become
    the standard output.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 - lives as long as the process
            if stream.fileno() > descriptor:
                with suppress(OSError):
                    os.dup2(stream.fileno(), descriptor)
            setattr(sys, name, stream)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _flush_stdout() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunLocalError(f"the output cannot be written: {error.strerror}") from error


def _leave_quietly() -> None:
    """Flush, or point a stream that cannot be written at nothing, or Python complains about it when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
