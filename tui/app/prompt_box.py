"""Where messages are typed: several lines, growing with them; history; long pastes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from textual import events
from textual.message import Message
from textual.widgets import TextArea

from tui.actions import ACTIONS

HISTORY_ENTRIES = 1000


class PromptHistory:
    """Messages sent before, the latest last, in a file of JSON strings. One that cannot be kept is no reason to
    complain."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.entries: list[str] = []
        if file is not None:
            with suppress(OSError, ValueError):
                lines = file.read_text("utf-8").splitlines()[-HISTORY_ENTRIES:]
                self.entries = [text for text in map(json.loads, lines) if isinstance(text, str)]

    def add(self, text: str) -> None:
        if self.entries[-1:] == [text]:
            return
        self.entries.append(text)
        if self._file is not None:
            with suppress(OSError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                with os.fdopen(descriptor, "a", encoding="utf-8", errors="replace") as file:
                    file.write(json.dumps(text, ensure_ascii=False) + "\n")


class PromptBox(TextArea):
    """Sends :class:`Sent`. Its keys are those of the actions whose scope is the prompt.

    They are no bindings: a binding would be looked up when a key arrives at the app, before the letters that came just
    ahead of it have reached this widget, and a message typed fast or sent in a burst would lose its end.
    """

    DEFAULT_CSS = """
    PromptBox { height: auto; min-height: 3; max-height: 10; border: round $primary 50%; padding: 0 1;
        background: $background; scrollbar-size-vertical: 1; }
    PromptBox:focus { border: round $primary; }
    """

    class Sent(Message):
        """A message was finished."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    class Leave(Message):
        """The key for leaving was pressed with nothing typed."""

    def __init__(self, history: PromptHistory, keys: Mapping[str, str], id: str | None = None) -> None:
        """``keys``: what the user wants other keys for, by action, comma-separated."""
        super().__init__(id=id, soft_wrap=True, show_line_numbers=False, highlight_cursor_line=False)
        self._actions = {
            key: action.name
            for action in ACTIONS
            if action.scope == "prompt"
            for key in (keys[action.name].split(",") if action.name in keys else action.keys)
        }
        self.placeholder = "ask something, or type / for a command"
        self._history = history
        self._place = 0  # how far back in the history
        self._typed = ""

    def on_key(self, event: events.Key) -> None:
        name = next((self._actions[key] for key in (event.key, *event.aliases) if key in self._actions), None)
        if name is None:
            return  # the text area's own handler comes next
        event.stop()
        event.prevent_default()
        steps = {
            "send": self.send,
            "newline": lambda: self.insert("\n"),
            "older": lambda: self._browse(1),
            "newer": lambda: self._browse(-1),
            "leave": self._leave,
        }
        steps[name]()

    def put(self, text: str) -> None:
        """Replace what is typed, the cursor at the end."""
        self.text = text
        self.move_cursor(self.document.end)
        self.focus()

    def remember(self, text: str) -> None:
        """Put a message that was sent into the history."""
        self._history.add(text)
        self._place = 0

    def on_paste(self, event: events.Paste) -> None:
        event.stop()
        event.prevent_default()
        # a terminal may send the ends of lines as carriage returns
        text = event.text.replace("\r\n", "\n").replace("\r", "\n")
        result = self.replace(text, *self.selection, maintain_selection_offset=False)
        self.move_cursor(result.end_location)

    def send(self) -> None:
        """Pass on what is typed, if anything is; whoever takes it empties the box."""
        if self.text.strip():
            self.post_message(self.Sent(self.text))

    def _leave(self) -> None:
        if self.text:
            self.action_delete_right()
        else:
            self.post_message(self.Leave())

    def _browse(self, step: int) -> None:
        row, _ = self.cursor_location
        if step > 0 and row > 0:
            self.action_cursor_up()
            return
        if step < 0 and row < self.document.line_count - 1:
            self.action_cursor_down()
            return
        entries: Sequence[str] = self._history.entries
        place = min(len(entries), max(0, self._place + step))
        if place == self._place:
            return
        if self._place == 0:
            self._typed = self.text
        self._place = place
        self.put(entries[-place] if place else self._typed)
