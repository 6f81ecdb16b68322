"""The chat's messages as one widget that draws lines.

A widget for every block, as Textual's Markdown has it, took 130 ms a line of an answer of 500 lines, and more with each
further one (Textual 8.2, 2 cores of an AMD EPYC). Here an answer's settled blocks are rendered once into strips; a
token costs the rendering of the unfinished block and of the lines on the screen.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from typing import ClassVar

from rich.cells import cell_len
from rich.style import Style
from textual import events
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.selection import Selection
from textual.strip import Strip
from textual.widget import Widget

from tui.app.entries import Answer, Entry
from tui.app.look import Look
from tui.app.render import Line, Renderer

_SLICE_SECONDS = 0.008
"""How long rendering may keep the screen from doing anything else."""


class Transcript(ScrollView, can_focus=True):
    """Entries from top to bottom. It follows the end until the user scrolls up, and again from the end on."""

    # Room for the scroll bar from the beginning: when it came, it would hide the ends of lines rendered before.
    DEFAULT_CSS = """
    Transcript { height: 1fr; overflow-x: hidden; scrollbar-gutter: stable; scrollbar-size-vertical: 1; padding: 0 1;
        scrollbar-background: $background; scrollbar-background-hover: $background;
        scrollbar-background-active: $background; }
    """
    ALLOW_SELECT: ClassVar[bool] = True

    class CopyWanted(Message):
        """A listing was clicked."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    def __init__(self, look: Look, id: str | None = None) -> None:
        super().__init__(id=id)
        self.entries: list[Entry] = []
        self._look = look
        self._ends: list[int] = []  # of each entry: the number of lines up to its end
        self._following = True
        self._catching_up: asyncio.Task[None] | None = None
        self._painted: dict[int, Line | None] = {}  # by row of the screen: what it shows; None is blank

    @property
    def renderer(self) -> Renderer:
        return Renderer(self._look, max(10, self.scrollable_content_region.width))

    @property
    def following(self) -> bool:
        """Whether the end is kept in sight."""
        return self._following

    def set_look(self, look: Look) -> None:
        """Another theme: all is rendered anew."""
        self._look = look
        self._spoil()

    def add(self, entry: Entry) -> None:
        """Append an entry, and follow it if the end was in sight."""
        entry.render(self.renderer)
        self.entries.append(entry)
        self._measure(len(self.entries) - 1)

    def extend(self, answer: Answer, text: str) -> None:
        """Some text of the last entry came."""
        answer.add(text, self.renderer)
        self._measure(len(self.entries) - 1)

    def changed(self, entry: Entry) -> None:
        """An entry is to be rendered anew."""
        entry.render(self.renderer)
        self._measure(self.entries.index(entry))

    def finish(self, answer: Answer) -> None:
        """The final rendering of a whole answer, in slices; the old lines stay until it is done."""
        answer.dirty = True
        self._catch_up()

    def remove_from(self, number: int) -> None:
        """Give up the entries from ``number`` on."""
        del self.entries[number:]
        self._measure(number)

    def replace(self, entries: list[Entry]) -> None:
        """Show these instead: the last ones at once, the others as there is time."""
        self.entries = entries
        self._following = True
        for entry in entries[-6:]:
            entry.render(self.renderer)
        self._measure(0)
        self._catch_up()

    def stay(self) -> None:
        """Go to the beginning and stay there."""
        self._following = False
        self.scroll_to(y=0, animate=False, immediate=True)

    def follow(self) -> None:
        """Go to the end and stay there."""
        self._following = True
        self.scroll_end(animate=False, immediate=True)

    # what Textual calls

    def on_resize(self, event: events.Resize) -> None:
        self._spoil()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        self._following = new_value >= self.max_scroll_y

    def render_line(self, y: int) -> Strip:
        scroll_x, scroll_y = self.scroll_offset
        number = scroll_y + y
        width, base = self.scrollable_content_region.width, self._look.base
        line = self._painted[y] = self._line(number) if number < self._total else None
        if line is None:
            return Strip.blank(width, base)
        strip = line.strip
        if (selection := self.text_selection) is not None and (span := selection.get_span(number)) is not None:
            strip = _selected(strip, span, self.screen.get_component_rich_style("screen--selection"))
        return strip.crop_extend(scroll_x, scroll_x + width, base).apply_offsets(scroll_x, number)

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        text = "\n".join(line.strip.text.rstrip() for entry in self.entries for line in entry.lines)
        return selection.extract(text), "\n"

    def selection_updated(self, selection: Selection | None) -> None:
        self.refresh()

    def on_click(self, event: events.Click) -> None:
        number = self.scroll_offset.y + event.get_content_offset_capture(self).y
        if not 0 <= number < self._total:
            return
        entry = self.entries[bisect_right(self._ends, number)]
        act = self._line(number).act
        if not isinstance(entry, Answer) or not act:
            return
        event.stop()
        if act == "think":
            entry.unfolded = not entry.unfolded
            self.changed(entry)
        else:
            self.post_message(self.CopyWanted(entry.code(int(act.removeprefix("code:")))))

    # inside

    @property
    def _total(self) -> int:
        """How many lines there are."""
        return self._ends[-1] if self._ends else 0

    def _line(self, number: int) -> Line:
        index = bisect_right(self._ends, number)
        entry = self.entries[index]
        return entry.lines[number - (self._ends[index] - len(entry.lines))]

    def _measure(self, start: int) -> None:
        """Add up the lines from entry ``start`` on, and show what changed."""
        following = self._following
        del self._ends[start:]
        total = self._total
        for entry in self.entries[start:]:
            total += len(entry.lines)
            self._ends.append(total)
        if self.virtual_size.height != total:
            self._set_height(total)
        if following:
            self._following = True
            self.scroll_to(y=self.max_scroll_y, animate=False, immediate=True, force=True)
            self._following = True
        self._paint_changed()

    def _set_height(self, total: int) -> None:
        """Set how much there is to scroll. A layout of the whole screen takes long and is spared where nothing but the
        scroll bar changes."""
        size = Size(self.scrollable_content_region.width, total)
        room = self.scrollable_content_region.height
        if self.show_vertical_scrollbar and min(self.virtual_size.height, total) > room > 0:
            self.set_reactive(Widget.virtual_size, size)
            self.vertical_scrollbar.window_virtual_size = total
        else:
            self.virtual_size = size

    def _paint_changed(self) -> None:
        """Paint the rows of the screen that no longer show what they should."""
        width, height = self.scrollable_content_region.size
        first = self.scroll_offset.y
        changed = []
        for y in range(height):
            line = self._line(first + y) if first + y < self._total else None
            if y not in self._painted or not _same(line, self._painted[y]):
                changed.append(Region(0, y, width, 1))
        if changed:
            self.refresh(*changed)

    def _spoil(self) -> None:
        for entry in self.entries:
            entry.dirty = True
        for entry in self.entries[-6:]:
            entry.render(self.renderer)
        self._measure(0)
        self._catch_up()

    def _catch_up(self) -> None:
        """Render what is dirty, the latest first, a slice at a time."""
        if self._catching_up is None or self._catching_up.done():
            self._catching_up = asyncio.create_task(self._render_dirty())

    async def _render_dirty(self) -> None:
        started = time.perf_counter()
        while dirty := next((entry for entry in reversed(self.entries) if entry.dirty), None):
            renderer = self.renderer
            for _ in dirty.steps(renderer):
                if time.perf_counter() - started > _SLICE_SECONDS:
                    await asyncio.sleep(0.001)
                    started = time.perf_counter()
            if renderer != self.renderer:
                dirty.dirty = True  # the width changed meanwhile
            elif dirty in self.entries:
                self._measure(self.entries.index(dirty))
        self._measure(0)


def _same(line: Line | None, other: Line | None) -> bool:
    return line is other or (line is not None and other is not None and line.strip == other.strip)


def _selected(strip: Strip, span: tuple[int, int], style: Style) -> Strip:
    """``strip`` with its characters from span[0] to span[1] (-1: the end) in ``style``."""
    text = strip.text
    start, end = span[0], len(text) if span[1] == -1 else span[1]
    left, right = cell_len(text[:start]), cell_len(text[:end])
    middle = Strip([type(s)(s.text, (s.style or Style()) + style) for s in strip.crop(left, right)])
    return Strip.join([strip.crop(0, left), middle, strip.crop(right, strip.cell_length)])
