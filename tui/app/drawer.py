"""The drawer of settings that can be changed while chatting, with what a change did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.message import Message
from textual.widgets import Input, Label

from offload.events import LiveChanges
from tui.app.look import Look
from tui.app.panel_box import LineBox
from tui.panel import Line
from tui.tuning import FIELDS


class Drawer(VerticalScroll):
    """A field for each setting that the engine has; Enter in a field applies it."""

    DEFAULT_CSS = """
    Drawer { width: 44; max-width: 60%; border: round $accent; padding: 0 1; background: $background; display: none; }
    Drawer .field { height: auto; margin: 0 0 1 0; }
    Drawer Label { color: $text-muted; }
    Drawer Input, Drawer Input:focus { border: none; height: 1; background: $surface; padding: 0 1; }
    Drawer Input:focus { background: $panel; }
    """

    class Change(Message):
        """A setting shall be changed to ``text``."""

        def __init__(self, name: str, text: str) -> None:
            super().__init__()
            self.name = name
            self.text = text

    def __init__(self, look: Look, id: str | None = None) -> None:
        super().__init__(id=id)
        self._look = look
        self.border_title = "tune"
        self.border_subtitle = "Enter applies · F4 closes"

    def compose(self) -> ComposeResult:
        for field in FIELDS:
            with Vertical(classes="field", id=f"field-{field.name}"):
                yield Label(field.label, markup=False, id=f"label-{field.name}")
                yield Input(id=f"set-{field.name}")
        yield LineBox(self._look, id="effect")

    def show(self, current: LiveChanges, choices: Mapping[str, Sequence[str]]) -> None:
        """Fill in what holds now; fields that this engine does not have are hidden."""
        for field in FIELDS:
            value: Any = getattr(current, field.name)
            box = self.query_one(f"#field-{field.name}")
            box.display = value is not None or bool(choices.get(field.name))
            names = choices.get(field.name, ())
            label = f"{field.label}: {', '.join(names)}" if names else field.label
            self.query_one(f"#label-{field.name}", Label).update(label)
            entry = self.query_one(f"#set-{field.name}", Input)
            if not entry.has_focus:
                entry.value = "" if value is None else field.show(value)

    def show_effect(self, lines: Sequence[Line]) -> None:
        """What the last change did."""
        self.query_one("#effect", LineBox).show(lines)

    @on(Input.Submitted)
    def _entered(self, event: Input.Submitted) -> None:
        event.stop()
        name = (event.input.id or "").removeprefix("set-")
        if event.value.strip():
            self.post_message(self.Change(name, event.value.strip()))
