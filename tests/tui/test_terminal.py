"""The chat on a real terminal: a pty, with Ctrl-C and Ctrl-D as keys."""

from __future__ import annotations

import os
import pty
import select
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.running import command, environment

CTRL_C, CTRL_D = b"\x03", b"\x04"
HANG_S = 60  # far more than anything here takes

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc to see a program wait")


class Session:
    """A process on a terminal of its own; what it shows is read until an expected text comes."""

    def __init__(self, folder: Path, *arguments: str, stdout: Path | None = None, **changes: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            try:
                os.chdir(folder)
                if stdout is not None:
                    os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT), 1)
                env = environment(folder, TERM="xterm", **changes)
                os.execve(sys.executable, command(*arguments), env)
            finally:
                os._exit(99)
        self._shown = b""
        self.all = b""

    def expect(self, text: bytes) -> bytes:
        """Read up to ``text``; returns what came before it."""
        while text not in self._shown:
            piece = self._read()
            assert piece, f"the program ended before it showed {text!r}: {self.all!r}"
            self._shown += piece
            self.all += piece
        before, _, self._shown = self._shown.partition(text)
        return before

    def type(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def type_when_idle(self, keys: bytes) -> None:
        """Wait until the program sleeps, then type.

        Python's readline loop loses a signal that comes between the handling of a key and the wait for the next one
        (until a later key or signal): no person is that fast, but a test is.
        """
        sleeping = 0
        while sleeping < 5:
            time.sleep(0.02)
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            sleeping = sleeping + 1 if state == "S" else 0
        self.type(keys)

    def _read(self) -> bytes:
        ready, _, _ = select.select([self._fd], [], [], HANG_S)
        assert ready, f"the program hangs: {self.all!r}"
        try:
            return os.read(self._fd, 4096)
        except OSError:  # the other side is gone
            return b""

    def end(self) -> int:
        """Wait for the end; returns the exit code."""
        while piece := self._read():
            self.all += piece
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def modes(self) -> list[object]:
        return termios.tcgetattr(self._fd)[:4]

    def close(self) -> None:
        os.close(self._fd)  # hangs the terminal up, which ends a program that still runs


@pytest.fixture
def sessions() -> Iterator[list[Session]]:
    started: list[Session] = []
    yield started
    for session in started:
        session.close()


def test_a_chat_until_ctrl_d(tmp_path: Path, sessions: list[Session]) -> None:
    sessions.append(session := Session(tmp_path, "good", "chat", "--plain"))
    session.expect(b"/help lists the commands")
    session.expect(b"> ")
    modes = session.modes()
    session.type(b"hello there\r")
    session.expect(b"A fine answer.")
    session.expect(b"context 5 of 1000")
    session.expect(b"> ")
    assert session.modes() == modes
    session.type(CTRL_D)
    assert session.end() == 0
    history = tmp_path / "state" / "run-local" / "history"
    assert "hello there" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
    assert not (tmp_path / "home").exists()


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(tmp_path: Path, sessions: list[Session]) -> None:
    sessions.append(session := Session(tmp_path, "waits", "chat", "--plain"))
    session.expect(b"> ")
    session.type(b"hello\r")
    session.expect(b"first second")
    session.type(CTRL_C)
    session.expect(b"stopped")
    session.expect(b"> ")
    session.type(b"typed but not sent")
    session.expect(b"typed but not sent")
    session.type_when_idle(CTRL_C)  # drops the line
    session.expect(b"> ")
    session.type(b"/save chat.md\r")
    session.expect(b"saved to chat.md")
    session.expect(b"> ")
    session.type_when_idle(CTRL_C)
    assert session.end() == 130
    assert b"Traceback" not in session.all
    assert "## Answer (stopped)\n\nfirst second\n" in (tmp_path / "chat.md").read_text()


def test_stdout_in_a_file_gets_the_answers_alone(tmp_path: Path, sessions: list[Session]) -> None:
    sessions.append(session := Session(tmp_path, "good", "chat", "--plain", stdout=tmp_path / "answers"))
    session.expect(b"> ")
    session.type(b"hello\r")
    session.expect(b"tokens/s")
    session.expect(b"> ")
    session.type(CTRL_D)
    assert session.end() == 0
    assert (tmp_path / "answers").read_bytes() == b"A fine answer.\n"


def test_without_colour_there_are_no_styles(tmp_path: Path, sessions: list[Session]) -> None:
    sessions.append(session := Session(tmp_path, "fails", "chat", "--plain", "hello", NO_COLOR="1"))
    assert session.end() == 1
    assert b"run-local: error: expert file" in session.all
    assert b"\x1b[31m" not in session.all and b"\x1b[2m" not in session.all


def test_an_unwritable_state_folder_is_no_problem(tmp_path: Path, sessions: list[Session]) -> None:
    (tmp_path / "file").write_text("")
    sessions.append(session := Session(tmp_path, "good", "chat", "--plain", XDG_STATE_HOME=str(tmp_path / "file")))
    session.expect(b"> ")
    session.type(CTRL_D)
    assert session.end() == 0
    assert b"rror" not in session.all
