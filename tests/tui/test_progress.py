"""Progress without a terminal: few plain lines; with one: a bar that goes away."""

from __future__ import annotations

import io
import re

import pytest

from offload.events import BatchProgress, LoadProgress, Notice, PrefillProgress
from tests.tui.helpers import RecordedScreen
from tui.progress import PLAIN_INTERVAL_S, BatchReporter, LoadReporter, PrefillReporter
from tui.screen import Screen


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_loading_in_plain_lines() -> None:
    screen, clock = RecordedScreen(), Clock()
    with LoadReporter(screen, clock) as report:
        for done in range(0, 101, 10):
            clock.now += PLAIN_INTERVAL_S / 4
            report(LoadProgress("packing", done * 2**20, 100 * 2**20, "bytes"))
        report(LoadProgress("packing", 100 * 2**20, 100 * 2**20, "bytes"))
        report(LoadProgress("layers", 1, 0, "steps"))
    report(Notice("later\x1b[31m"))
    assert screen.err.splitlines() == [
        "packing: 0 B of 100 MiB",
        "packing: 40.0 MiB of 100 MiB",
        "packing: 80.0 MiB of 100 MiB",
        "packing: 100 MiB of 100 MiB",
        "layers: 1",
        "later[31m",
    ]


def test_loading_on_a_terminal_shows_a_bar_and_leaves_the_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with LoadReporter(Screen(io.StringIO(), terminal)) as report:
        report(LoadProgress("packing [1]", 0, 2**20, "bytes"))
        report(LoadProgress("packing [1]", 2**19, 2**20, "bytes"))
        report(Notice("a notice"))
        report(LoadProgress("layers", 1, 3, "steps"))
    shown = terminal.getvalue()
    assert "packing [1]" in shown and "a notice" in shown and "layers" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")  # the cursor comes back


def test_the_bar_goes_when_loading_fails() -> None:
    terminal = Terminal()
    with pytest.raises(RuntimeError), LoadReporter(Screen(io.StringIO(), terminal)) as report:
        report(LoadProgress("packing", 0, 2**20, "bytes"))
        raise RuntimeError
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h")


def test_prefill_says_nothing_for_a_short_prompt_and_a_line_now_and_then_for_a_long_one() -> None:
    screen, clock = RecordedScreen(), Clock()
    with PrefillReporter(screen, clock) as report:
        report(PrefillProgress(0, 100, 0))
        clock.now += PLAIN_INTERVAL_S
        report(PrefillProgress(50, 100, 0))
        clock.now += PLAIN_INTERVAL_S
        report(PrefillProgress(100, 100, 0))
    assert screen.err == "reading the prompt: 50 of 100 tokens\n"


def test_batch_in_plain_lines() -> None:
    screen, clock = RecordedScreen(), Clock()
    with BatchReporter(screen, clock=clock) as report:
        report(BatchProgress(0, 10, 0, 0, 1, None, None))
        clock.now += PLAIN_INTERVAL_S
        report(BatchProgress(1, 10, 1, 5, 2, 3.14, 0.5))
        report(BatchProgress(2, 10, 1, 5, 2, 3.14, 0.5))
        clock.now += PLAIN_INTERVAL_S
        report(BatchProgress(2, None, 0, 9, 0, None, None))
    assert screen.err.splitlines() == [
        "1 of 10 rows, 1 with an error | 7 tokens | 3.1 tokens/s | hit rate 50.0 %",
        "2 rows, 0 with an error | 9 tokens | - tokens/s | hit rate -",
    ]


def test_no_color_means_no_styles_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    Screen(io.StringIO(), terminal).problem("oh")
    assert terminal.getvalue() == "run-local: error: oh\n"


def test_no_escape_codes_in_a_pipe_even_if_colour_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    screen = RecordedScreen()
    screen.problem("oh")
    with LoadReporter(screen) as report:
        report(LoadProgress("packing", 0, 10, "bytes"))
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", screen.err)


def test_an_answer_cannot_drive_the_terminal_but_reaches_a_pipe_as_it_is() -> None:
    evil = "a\x1b]0;title\x07b\x9b31m\tc\r\n"
    terminal, pipe = Terminal(), io.StringIO()
    Screen(terminal, io.StringIO()).answer(evil)
    Screen(pipe, io.StringIO()).answer(evil)
    assert terminal.getvalue() == "a]0;titleb31m\tc\n"
    assert pipe.getvalue() == evil
