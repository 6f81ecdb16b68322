"""What the chat uses of Textual without a promise: each of these fails if it goes."""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cli.running import environment
from tests.tui.terminal import Terminal, restored


@contextmanager
def scripted_chat(folder: Path, *arguments: str, **changes: str) -> Iterator[Terminal]:
    """The program with a scripted engine, asked something; its answer is two tokens long and does not end."""
    folders = {f"XDG_{kind}_HOME": str(folder / kind.lower()) for kind in ("DATA", "STATE", "CONFIG")}
    kept = environment(folder, **folders, **changes)
    terminal = Terminal([sys.executable, "-m", "tests.tui.app_main", *arguments], folder, kept, (80, 24))
    try:
        terminal.wait("chat with ")
        terminal.type("Name three colours.\r")
        yield terminal
    finally:
        terminal.close()


def test_a_bug_of_the_screen_ends_in_a_line_and_a_report(tmp_path: Path) -> None:
    with scripted_chat(tmp_path, "crash") as terminal:
        assert terminal.leave() == 1
        assert restored(terminal)
        left = terminal.raw[terminal.raw.rindex("\x1b[?1049l") :]
    found = re.search(r"this is a bug \(ValueError: what no one has thought of\); please report it with (\S+)", left)
    assert found is not None and "Traceback" not in left, left
    assert "Crashing" not in left and "raise ValueError" in Path(found.group(1)).read_text("utf-8")
    saved = next((tmp_path / "data" / "run-local" / "conversations").iterdir())
    assert "Name three colours." in saved.read_text("utf-8")


def test_a_copy_reaches_the_terminal_around_tmux(tmp_path: Path) -> None:
    with scripted_chat(tmp_path, TMUX="/tmp/tmux,1,0") as terminal:
        terminal.wait("red green")
        terminal.type("\x1b")
        terminal.wait("stopped")
        terminal.type("\x19")
        terminal.wait("copied the answer")
        coded = base64.b64encode(b"red green blue").decode()
        assert f"\x1bPtmux;\x1b\x1b]52;c;{coded}\a\x1b\\" in terminal.raw
        terminal.type("\x11")
        assert terminal.leave() == 0
