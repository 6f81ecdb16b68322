"""What a front end writes: answers to stdout, everything else to stderr. No escape codes unless it is a terminal."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from rich.console import Console

from offload.errors import RunLocalError
from tui.text import one_line, printable


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the program itself, with another exit code


class Screen:
    """Both output streams. ``console`` writes to stderr, in plain text under ``NO_COLOR`` or without a terminal."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        err = err or sys.stderr
        self._mid_line = False
        self._mid_thought = False
        self._out_is_terminal = self._out.isatty()
        self.is_terminal = err.isatty()
        self.console = _Console(
            file=err,
            force_terminal=self.is_terminal,  # said outright: FORCE_COLOR would put escape codes into pipes
            force_interactive=None if self.is_terminal else False,
            color_system="auto" if self.is_terminal and not os.environ.get("NO_COLOR") else None,
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=True,
        )

    @property
    def shares_terminal(self) -> bool:
        """Whether answers and notes most likely go to the same terminal."""
        return self._out_is_terminal and self.is_terminal

    def answer(self, text: str) -> None:
        """Show a piece of an answer at once. Raises BrokenPipeError, or RunLocalError when stdout cannot be written."""
        if self._out_is_terminal:
            text = printable(text)
        if not text:
            return
        self._end_thought()
        self._mid_line = not text.endswith("\n")
        try:
            self._out.write(text)
            self._out.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise RunLocalError(f"the output cannot be written: {error.strerror}") from error

    def thought(self, text: str) -> None:
        """Show a piece of what the model thinks before it answers at once, on stderr."""
        if text:
            self._mid_thought = True
            self.console.print(printable(text), style="dim", end="")

    def end_answer(self) -> None:
        """End a line that an answer left open."""
        if self._mid_line:
            self.answer("\n")

    def note(self, text: str, style: str = "") -> None:
        """Lines on stderr; they may come from a file or a model, so they cannot drive the terminal."""
        self._end_thought()
        self.console.print(printable(text), style=style or None)

    def status(self, text: str) -> None:
        """A line of figures on stderr."""
        self.note(one_line(text), "dim")

    def problem(self, text: str) -> None:
        """One line on stderr about something that did not work; the program goes on."""
        self.note(f"run-local: error: {one_line(text)}", "red")

    def _end_thought(self) -> None:
        if self._mid_thought:
            self._mid_thought = False
            self.console.print("\n")  # and a line between it and the answer
