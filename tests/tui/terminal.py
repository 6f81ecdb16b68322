"""A program in a pseudo-terminal, and what its screen says: enough of a terminal for what Textual writes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

_CONTROL = re.compile(r"\x1b\[([?<>=]?)([\d;:]*)[ -/]*([@-~])|\x1b[PX^_\]].*?(?:\x1b\\|\a)|\x1b[^\[P\]]", re.DOTALL)


class Terminal:
    """Runs ``command``. ``raw`` is all that it wrote."""

    def __init__(
        self, command: Sequence[str], folder: Path, environment: dict[str, str], size: tuple[int, int]
    ) -> None:
        self.width, self.height = size
        self._master, self._slave = pty.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", self.height, self.width, 0, 0))
        self.modes_before = termios.tcgetattr(self._slave)
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment | {"TERM": "xterm-256color", "COLUMNS": "", "LINES": ""},
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            start_new_session=True,
        )
        self.raw = ""
        self._rest = ""
        self._x = self._y = 0
        self.blank()

    def text(self) -> str:
        """The screen's lines."""
        return "\n".join("".join(row).rstrip() for row in self._cells)

    def type(self, keys: str) -> None:
        """As if typed."""
        os.write(self._master, keys.encode())

    def wait(self, ready: Callable[[str], bool] | str, seconds: float = 90) -> str:
        """Wait until the screen says so; returns its text."""
        check = (lambda text: ready in text) if isinstance(ready, str) else ready
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if check(self.text()):
                return self.text()
            self._read(0.2)
        raise AssertionError(f"the screen never said {ready!r}:\n{self.text()}\n{self.raw[-2000:]!r}")

    def blank(self) -> None:
        """Forget what is on the screen."""
        self._cells = [[" "] * self.width for _ in range(self.height)]

    def settled(self, seconds: float = 90) -> str:
        """Wait until the screen has not changed for a second; returns its text."""
        end, quiet, text = time.monotonic() + seconds, time.monotonic(), self.text()
        while (now := time.monotonic()) < min(end, quiet + 1):
            self._read(0.1)
            if self.text() != text:
                quiet, text = now, self.text()
        return text

    def leave(self, seconds: float = 30) -> int:
        """Wait for the program's end; returns its exit code."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            self._read(0.1)
        self._read(0.1)
        return self.process.wait(1)

    def modes(self) -> list[object]:
        """The terminal's settings now."""
        return termios.tcgetattr(self._slave)

    def hang_up(self) -> None:
        """As if the window was closed, without a signal to tell the program so."""
        os.close(self._master)
        self._master = -1

    def close(self) -> None:
        with suppress(ProcessLookupError):  # its group may live on without it
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for descriptor in (self._master, self._slave):
            if descriptor >= 0:
                os.close(descriptor)

    def _read(self, seconds: float) -> None:
        while select.select([self._master], [], [], seconds)[0]:
            try:
                piece = os.read(self._master, 65536).decode("utf-8", "replace")
            except OSError:
                return
            self.raw += piece
            self._draw(self._rest + piece)
            seconds = 0

    def _draw(self, text: str) -> None:
        place = 0
        while place < len(text):
            char = text[place]
            if char == "\x1b":
                found = _CONTROL.match(text, place)
                if found is None:
                    break  # its end is still to come
                self._control(found.group(1) or "", found.group(2) or "", found.group(3) or "")
                place = found.end()
                continue
            if char == "\r":
                self._x = 0
            elif char == "\n":
                self._x, self._y = 0, min(self.height - 1, self._y + 1)
            elif char >= " ":
                if self._x < self.width:
                    self._cells[self._y][self._x] = char
                self._x += 1
            place += 1
        self._rest = text[place:]

    def _control(self, mark: str, numbers: str, letter: str) -> None:
        values = [int(number) for number in numbers.replace(":", ";").split(";") if number]
        if letter == "H" and not mark:
            row, column = (*values, 1, 1)[:2] if len(values) != 1 else (values[0], 1)
            self._y, self._x = min(self.height, row) - 1, min(self.width, column) - 1
        elif letter == "J" and values == [2]:
            self.blank()
        elif letter == "n" and values == [6]:
            self.type(f"\x1b[{self._y + 1};{self._x + 1}R")


def restored(terminal: Terminal) -> bool:
    """The terminal is as it was: its modes, the normal screen, a cursor, no mouse."""
    last = {code: terminal.raw.rfind(f"\x1b[?{code}h") - terminal.raw.rfind(f"\x1b[?{code}l") for code in (1049, 1000)}
    cursor = terminal.raw.rfind("\x1b[?25l") < terminal.raw.rfind("\x1b[?25h")
    return terminal.modes() == terminal.modes_before and cursor and all(value < 0 for value in last.values())
