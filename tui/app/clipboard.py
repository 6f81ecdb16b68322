"""Copying: to the terminal over OSC 52, through tmux where the chat runs in one, and to a file."""

from __future__ import annotations

import base64
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from textual.app import App

from tui.app.internals import write_to_terminal


def copy_text(app: App[Any], text: str, file: Path | None) -> Path | None:
    """Copy ``text``; returns the file that has it too, or None if it could not be written."""
    text = text.encode("utf-8", "replace").decode()  # half a character of a paste cannot be sent
    app.copy_to_clipboard(text)
    if os.environ.get("TMUX"):
        # tmux takes OSC 52 only if it is set to; what is wrapped like this goes to the terminal around it
        coded = base64.b64encode(text.encode()).decode()
        write_to_terminal(app, f"\x1bPtmux;\x1b\x1b]52;c;{coded}\a\x1b\\")
    if file is None:
        return None
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as out:
            out.write(text)
        return file
    return None
