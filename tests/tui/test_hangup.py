"""A terminal that is gone ends the chat; nothing of the conversation is lost and nothing is left running."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.running import environment
from tests.tui.terminal import Terminal, restored
from tui.app.hangup import HangupWatch

WAIT_S = 40


@pytest.mark.parametrize("asked", [False, True])
def test_the_chat_ends_with_its_terminal(tmp_path: Path, asked: bool) -> None:
    folders = {f"XDG_{kind}_HOME": str(tmp_path / kind.lower()) for kind in ("DATA", "STATE", "CONFIG")}
    kept = environment(tmp_path, **folders)
    terminal = Terminal([sys.executable, "-m", "tests.tui.app_main"], tmp_path, kept, (80, 24))
    try:
        terminal.wait("chat with ")
        if asked:
            terminal.type("Name three colours.\r")
            terminal.wait("red green")
        terminal.hang_up()
        assert terminal.process.wait(WAIT_S) == 129
    finally:
        terminal.close()
    saved = [path.read_text("utf-8") for path in (tmp_path / "data" / "run-local" / "conversations").glob("*.jsonl")]
    assert [("Name three colours." in text, "red green" in text) for text in saved] == [(True, True)] * asked
    assert not list((tmp_path / "state" / "run-local").glob("reports/*"))


@contextmanager
def scripted_chat(folder: Path) -> Iterator[Terminal]:
    """The chat with the scripted engine, when it is ready."""
    folders = {f"XDG_{kind}_HOME": str(folder / kind.lower()) for kind in ("DATA", "STATE", "CONFIG")}
    terminal = Terminal([sys.executable, "-m", "tests.tui.app_main"], folder, environment(folder, **folders), (80, 24))
    try:
        terminal.wait("chat with ")
        yield terminal
    finally:
        terminal.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_chat_and_the_terminal_is_as_before(tmp_path: Path, number: signal.Signals) -> None:
    with scripted_chat(tmp_path) as terminal:
        terminal.type("Name three colours.\r")
        terminal.wait("red green")
        terminal.process.send_signal(number)
        assert terminal.leave() == 128 + number
        assert restored(terminal)


def test_put_aside_and_brought_back_it_paints_all_again(tmp_path: Path) -> None:
    with scripted_chat(tmp_path) as terminal:
        terminal.settled()
        terminal.type("\x1a")
        while Path(f"/proc/{terminal.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            terminal._read(0.05)
        assert restored(terminal)
        terminal.blank()
        terminal.process.send_signal(signal.SIGCONT)
        terminal.wait(lambda text: all(part in text for part in ("chat with ", "ask something", "F1 help")))
        terminal.type("\x11")
        assert terminal.leave() == 0


def test_a_descriptor_that_is_gone_leads_nowhere() -> None:
    master, slave = os.openpty()
    told = threading.Event()
    watch = HangupWatch(told.set, 129, (slave,), interval=0.01)
    try:
        assert not told.wait(0.1)
        os.close(master)
        assert told.wait(WAIT_S)
        assert not os.isatty(slave)
        assert os.write(slave, b"into the void") == 13
    finally:
        watch.stop()
        os.close(slave)


def test_what_is_no_terminal_is_not_watched() -> None:
    out, into = os.pipe()
    told = threading.Event()
    watch = HangupWatch(told.set, 129, (into,), interval=0.01)
    os.close(out)
    assert not told.wait(0.2)
    watch.stop()
    os.close(into)
