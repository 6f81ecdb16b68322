"""Screens over the chat: a text to read, a list to choose from, the large map, a line to type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from offload.events import CacheSnapshot
from tui.app.entries import Document
from tui.app.look import Look
from tui.app.map_box import ExpertMap, Score
from tui.app.panel_box import LineBox
from tui.app.transcript import Transcript
from tui.text import one_line

BOX = """
    align: center middle;
    & > Vertical { width: 92%; max-width: 110; height: 88%; border: round $primary; padding: 0 1;
        background: $background; }
"""


class TextScreen(ModalScreen[None]):
    """Something to read; Escape closes it."""

    DEFAULT_CSS = f"TextScreen {{ {BOX} }}"
    BINDINGS = [Binding("escape,f1,q,ctrl+c", "dismiss", "close")]  # noqa: RUF012 - as Textual wants it

    def __init__(self, title: str, markdown: str, look: Look) -> None:
        super().__init__()
        self._title = title
        self._markdown = markdown
        self._look = look

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = self._title
            box.border_subtitle = "Esc closes"
            yield Transcript(self._look, id="reading")

    def on_mount(self) -> None:
        self.call_after_refresh(self._show)

    def _show(self) -> None:
        reading = self.query_one("#reading", Transcript)
        reading.stay()
        reading.add(Document(self._markdown))
        reading.focus()


class LineScreen(ModalScreen[str | None]):
    """Asks for one line; None if it was given up."""

    DEFAULT_CSS = """
    LineScreen { align: center middle; & > Vertical { width: 70%; height: auto; border: round $primary;
        background: $background; padding: 0 1; } }
    """
    BINDINGS = [Binding("escape,ctrl+c", "dismiss(None)", "close")]  # noqa: RUF012 - as Textual wants it

    def __init__(self, title: str, text: str = "") -> None:
        super().__init__()
        self._title = title
        self._text = text

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = self._title
            yield Input(self._text, id="line", compact=True)

    @on(Input.Submitted)
    def _take(self, event: Input.Submitted) -> None:
        self.dismiss(event.value.strip() or None)


@dataclass(frozen=True, slots=True)
class Item:
    """A row of a list. ``text`` is shown and searched, ``detail`` is the dim line below it."""

    id: str
    text: str
    detail: str = ""


class ListScreen(ModalScreen[tuple[str, str] | None]):
    """A list to search and choose from: (what, id), ``what`` being "choose" or one of ``extra``; None: nothing.

    ``search`` gives the rows for what is typed. ``free``: Enter takes what is typed where no row fits.
    """

    DEFAULT_CSS = f"""
    ListScreen {{ {BOX} }}
    ListScreen OptionList {{ height: 1fr; border: none; background: $background; }}
    ListScreen Input, ListScreen Input:focus {{ border: none; height: 1; background: $surface; margin: 0 0 1 0;
        padding: 0 1; }}
    ListScreen #hint {{ color: $text-muted; height: 1; }}
    """
    BINDINGS = [  # noqa: RUF012 - as Textual wants it
        Binding("escape,ctrl+c", "dismiss(None)", "close"),
        Binding("down", "step(1)", show=False, priority=True),
        Binding("up", "step(-1)", show=False, priority=True),
        Binding("delete", "extra('delete')", show=False, priority=True),
        Binding("f2", "extra('rename')", show=False, priority=True),
    ]

    def __init__(
        self,
        title: str,
        hint: str,
        search: Callable[[str], Sequence[Item]],
        *,
        extra: Sequence[str] = (),
        free: bool = False,
        words: str = "",
    ) -> None:
        super().__init__()
        self._title = title
        self._hint = hint
        self._search = search
        self._extra = tuple(extra)
        self._free = free
        self._words = words
        self._asked_for = ""

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = self._title
            yield Input(self._words, placeholder="type to search", id="search")
            yield OptionList(id="rows")
            yield Static(self._hint, id="hint", markup=False)

    def on_mount(self) -> None:
        self.fill()
        self.query_one("#search", Input).focus()

    def fill(self) -> None:
        """Look for the rows again."""
        rows = self.query_one("#rows", OptionList)
        rows.clear_options()
        for item in self._search(self.query_one("#search", Input).value):
            rows.add_option(Option(_label(item), id=item.id))
        if rows.option_count:
            rows.highlighted = 0

    @on(Input.Changed)
    def _typed(self) -> None:
        self._say(self._hint)
        self.fill()

    @on(Input.Submitted)
    def _entered(self, event: Input.Submitted) -> None:
        chosen = self._chosen()
        if chosen is not None:
            self.dismiss(("choose", chosen))
        elif self._free and event.value.strip():
            self.dismiss(("choose", event.value.strip()))

    @on(OptionList.OptionSelected)
    def _clicked(self, event: OptionList.OptionSelected) -> None:
        if event.option_id is not None:
            self.dismiss(("choose", event.option_id))

    def action_step(self, by: int) -> None:
        rows = self.query_one("#rows", OptionList)
        if rows.option_count:
            rows.highlighted = ((rows.highlighted or 0) + by) % rows.option_count
            self._asked_for = ""

    def action_extra(self, what: str) -> None:
        chosen = self._chosen()
        if what not in self._extra or chosen is None:
            return
        if what == "delete" and self._asked_for != chosen:
            self._asked_for = chosen
            self._say("Delete again to delete it for good")
            return
        self.dismiss((what, chosen))

    def _chosen(self) -> str | None:
        rows = self.query_one("#rows", OptionList)
        if rows.highlighted is None:
            return None
        return rows.get_option_at_index(rows.highlighted).id

    def _say(self, text: str) -> None:
        self.query_one("#hint", Static).update(text)


class MapScreen(ModalScreen[None]):
    """The map of all experts on the whole screen."""

    DEFAULT_CSS = """
    MapScreen > Vertical { width: 100%; height: 100%; border: round $primary; padding: 0 1; background: $background; }
    """
    BINDINGS = [Binding("escape,f3,ctrl+c", "dismiss", "close")]  # noqa: RUF012 - as Textual wants it

    def __init__(self, look: Look) -> None:
        super().__init__()
        self._look = look

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = "experts: layers down, experts across"
            box.border_subtitle = "arrows or mouse tell of one · Esc closes"
            yield LineBox(self._look, id="legend")
            yield ExpertMap(self._look, id="large-map")

    def on_mount(self) -> None:
        self.query_one("#large-map", ExpertMap).focus()

    def show(self, snapshot: CacheSnapshot, score: Score) -> None:
        """Show a new state; ``score`` is the engine's."""
        for map in self.query(ExpertMap):
            map.show(snapshot, score)
            self.query_one("#legend", LineBox).show([map.legend])


def _label(item: Item) -> str:
    from rich.markup import escape

    detail = f"\n[dim]{escape(one_line(item.detail))}[/dim]" if item.detail else ""
    return f"{escape(one_line(item.text))}{detail}"
