"""The widgets of the live figures: the panel at the side, and the line that stands in for it on narrow screens."""

from __future__ import annotations

from collections.abc import Sequence

from textual.geometry import Region, Size
from textual.strip import Strip
from textual.widget import Widget

from tui.app.look import Look
from tui.app.render import Line, Renderer
from tui.panel import Line as Figures
from tui.text import printable


class LineBox(Widget):
    """Draws ready lines: no layout and no markup, so that a repaint costs only the lines that changed."""

    DEFAULT_CSS = "LineBox { height: auto; }"

    def __init__(self, look: Look, id: str | None = None) -> None:
        super().__init__(id=id)
        self._look = look
        self._lines: list[Line] = []
        self._shown: Sequence[Figures] = ()

    @property
    def plain(self) -> str:
        """What it shows, without styles."""
        return "\n".join(line.strip.text.rstrip() for line in self._lines)

    def show(self, lines: Sequence[Figures]) -> None:
        """Show these; only what differs is rendered and painted."""
        width = self.content_size.width
        before, self._shown = self._shown, lines
        if width <= 0:
            self._lines = []
            return
        grown = len(lines) != len(self._lines)
        known = len(self._lines) if len(self._lines) == len(before) else 0
        changed = [y for y, line in enumerate(lines) if y >= known or line != before[y]]
        safe = [[(printable(text), style) for text, style in lines[y]] for y in changed]
        fresh = dict(zip(changed, Renderer(self._look, width).pieces(safe), strict=True))
        self._lines = [fresh[y] if y in fresh else self._lines[y] for y in range(len(lines))]
        if grown:
            self.refresh(layout=True)
        elif changed:
            self.refresh(*(Region(0, y, width, 1) for y in changed))

    def set_look(self, look: Look) -> None:
        self._look = look
        self._lines = []
        self.show(self._shown)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return max(1, len(self._shown))

    def on_resize(self) -> None:
        self._lines = []
        self.show(self._shown)
        self.refresh()

    def render_line(self, y: int) -> Strip:
        if y < len(self._lines):
            return self._lines[y].strip
        return Strip.blank(self.size.width, self._look.base)
