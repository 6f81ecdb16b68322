"""The widgets of the live figures: the panel at the side, and the line that stands in for it on narrow screens."""

from __future__ import annotations

from collections.abc import Sequence

from textual.geometry import Size
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
        """Show these; only what differs is painted."""
        width = self.content_size.width
        self._shown = lines
        if width <= 0:
            return
        safe = [[(printable(text), style) for text, style in line] for line in lines]
        fresh = Renderer(self._look, width).pieces(safe)
        grown = len(fresh) != len(self._lines)
        changed = [y for y, line in enumerate(fresh) if y >= len(self._lines) or line.strip != self._lines[y].strip]
        self._lines = fresh
        if grown:
            self.refresh(layout=True)
        else:
            for y in changed:
                self.refresh_line(y)

    def refresh_line(self, y: int) -> None:
        """Paint line ``y`` again."""
        from textual.geometry import Region

        self.refresh(Region(0, y, self.content_size.width, 1))

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
