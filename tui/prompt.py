"""Read what the user types: editing and history where there are any, and messages of several lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tui.folders import state_folder
from tui.screen import Screen

PROMPT = "> "
CONTINUATION = ". "
BLOCK = '"""'
HISTORY_LINES = 1000


@dataclass(frozen=True, slots=True)
class Entry:
    """One message. ``verbatim``: it came between triple quotes and is never a command."""

    text: str
    verbatim: bool = False


class PromptReader:
    """Reads messages with ``read_line(prompt)``, which raises EOFError, KeyboardInterrupt or UnicodeDecodeError.

    ``typed`` tells what stood on the line when Ctrl-C came.
    """

    def __init__(self, screen: Screen, read_line: Callable[[str], str], typed: Callable[[], str] = str) -> None:
        self._screen = screen
        self._read_line = read_line
        self._typed = typed

    def read(self) -> Entry:
        """The next message that is not blank.

        Raises EOFError after Ctrl-D, and KeyboardInterrupt after Ctrl-C on an empty line; Ctrl-C on anything else
        only drops what was typed.
        """
        while True:
            lines: list[str] = []
            try:
                entry = self._read_entry(lines)
            except KeyboardInterrupt:
                self._screen.note("")
                if not lines and not self._typed():
                    raise
                continue
            except EOFError:
                self._screen.note("")
                if lines:
                    self._screen.note("the unfinished message was not sent")
                raise
            except UnicodeDecodeError as error:
                self._screen.problem(f"that line is not valid UTF-8 at byte {error.start}")
                continue
            if entry.text.strip():
                return entry

    def _read_entry(self, lines: list[str]) -> Entry:
        line = self._read_line(PROMPT)
        if line.lstrip().startswith(BLOCK):
            return self._read_block(line.lstrip()[len(BLOCK) :], lines)
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = self._read_line(CONTINUATION)
        return Entry("\n".join([*lines, line]))

    def _read_block(self, line: str, lines: list[str]) -> Entry:
        while not line.rstrip().endswith(BLOCK):
            lines.append(line)
            line = self._read_line(CONTINUATION)
        lines.append(line.rstrip()[: -len(BLOCK)])
        text = "\n".join(lines)
        return Entry(text.strip("\n"), verbatim=True)


def terminal_reader(screen: Screen) -> PromptReader:
    """A reader of the terminal on stdin, with history in the user's state folder where that can be written.

    If stdout is no terminal the prompt goes to stderr, since stdout is for answers.
    """
    if not sys.stdout.isatty():
        return PromptReader(screen, _line_without_editing)
    try:
        import readline
    except ImportError:
        return PromptReader(screen, input)
    folder = state_folder()
    if folder is not None:
        _keep_history(folder / "history")
    return PromptReader(screen, input, readline.get_line_buffer)


def _line_without_editing(prompt: str) -> str:
    sys.stderr.write(prompt)
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _keep_history(path: Path) -> None:
    """Load the history and save it when the program ends. A history that cannot be kept is no reason to complain."""
    import atexit
    import readline

    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # questions are private
        readline.read_history_file(path)
    before = readline.get_current_history_length()

    def save() -> None:
        with suppress(OSError):
            # appending keeps what a second chat wrote meanwhile
            if hasattr(readline, "append_history_file"):
                readline.append_history_file(readline.get_current_history_length() - before, path)
            else:
                readline.write_history_file(path)

    readline.set_history_length(HISTORY_LINES)
    atexit.register(save)
