"""The map of all experts: half a line for each row of cells, lit as they are used, with details under the cursor."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from rich.segment import Segment
from textual import events
from textual.binding import Binding
from textual.geometry import Region, Size
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from offload.events import CacheSnapshot
from tui.app.look import Look, color_name
from tui.app.map_colors import Palette, half_blocks, palette
from tui.expert_map import GLYPHS, Cell, Grid, describe, make_grid
from tui.panel import Line

Score = Callable[[int, int], float | None]
"""Of (layer, expert): what the policy goes by, see :meth:`offload.protocol.LiveEngine.expert_score`."""


class ExpertMap(Widget, can_focus=True):
    """Layers from top to bottom, experts from left to right. The arrow keys and the mouse move the cursor."""

    DEFAULT_CSS = "ExpertMap { height: 1fr; min-height: 6; }"
    BINDINGS = [  # noqa: RUF012 - as Textual wants it
        Binding("up", "move(-1, 0)", show=False),
        Binding("down", "move(1, 0)", show=False),
        Binding("left", "move(0, -1)", show=False),
        Binding("right", "move(0, 1)", show=False),
    ]
    cursor: reactive[tuple[int, int] | None] = reactive(None)

    def __init__(self, look: Look, id: str | None = None) -> None:
        super().__init__(id=id)
        self._look = look
        self._snapshot: CacheSnapshot | None = None
        self._score: Score = lambda layer, expert: None
        self._grid: Grid | None = None
        self._strips: list[Strip] = []

    @property
    def glyphs(self) -> bool:
        """Whether it draws letters: without colours."""
        return self.app.no_color

    @property
    def details(self) -> str:
        """The line about what is under the cursor, or what a cell covers."""
        snapshot, grid = self._snapshot, self._grid
        if snapshot is None or grid is None:
            return "no model"
        if self.cursor is not None and self.cursor[0] < len(snapshot.layers):
            row, expert = self.cursor
            return describe(snapshot, row, expert, self._score(snapshot.layers[row], expert))
        layers, experts = len(snapshot.layers), max(map(len, snapshot.states), default=0)
        cell = (
            ""
            if grid.layers_each == grid.experts_each == 1
            else (f" · a cell is {grid.layers_each} x {grid.experts_each}")
        )
        return f"{layers} layers x {experts} experts{cell}"

    @property
    def legend(self) -> Line:
        """What the cells mean, each as it looks."""
        tiers = [tier.name for tier in self._snapshot.tiers] if self._snapshot is not None else []
        meanings = {Cell.HIT: "hit", Cell.MISSED: "missed", Cell.LOADING: "on its way"}
        meanings[Cell.RESIDENT] = f"in {tiers[0]}" if tiers else "resident"
        if len(tiers) > 1:
            meanings[Cell.HOSTED] = f"in {tiers[1]}"
        meanings[Cell.ABSENT] = "on disk"
        if self.glyphs:
            return [("  ".join(f"{GLYPHS[cell]} {text}" for cell, text in meanings.items()), "")]
        return [
            piece
            for cell, text in meanings.items()
            for piece in (("■ ", color_name(self._palette.color(cell, 1.0))), (f"{text}  ", ""))
        ]

    def lines_wanted(self, snapshot: CacheSnapshot) -> int:
        """Lines with which each layer has a row of its own."""
        return -(-len(snapshot.layers) // self._per_line) + self._details_lines

    def set_look(self, look: Look) -> None:
        self._look = look
        self._paint()

    def show(self, snapshot: CacheSnapshot, score: Score) -> None:
        """Show a new state; ``score`` is asked for the expert under the cursor."""
        self._snapshot, self._score = snapshot, score
        self._make()

    def on_resize(self) -> None:
        self._make()

    def action_move(self, down: int, right: int) -> None:
        if self._snapshot is None or self._grid is None:
            return
        row, expert = self.cursor or (0, 0)
        if self.cursor is not None:
            row += down * self._grid.layers_each
            expert += right * self._grid.experts_each
        rows = len(self._snapshot.layers)
        experts = max(map(len, self._snapshot.states), default=1)
        self.cursor = (min(rows - 1, max(0, row)), min(experts - 1, max(0, expert)))

    def on_mouse_move(self, event: events.MouseMove) -> None:
        grid, snapshot = self._grid, self._snapshot
        if grid is None or snapshot is None:
            return
        row, column = event.y * self._per_line, event.x // self._stretch(grid)
        if row < len(grid.cells) and column < len(grid.cells[0]):
            self.cursor = (row * grid.layers_each, column * grid.experts_each)

    def watch_cursor(self) -> None:
        self._paint()

    def render_line(self, y: int) -> Strip:
        return self._strips[y] if y < len(self._strips) else Strip.blank(self.size.width, self._look.base)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return 10

    def _make(self) -> None:
        width, height = self.size
        if self._snapshot is None or width < 1:
            return
        lines = max(1, height - self._details_lines)
        self._grid = make_grid(self._snapshot, lines * self._per_line, width)
        self._paint()

    def _paint(self) -> None:
        """Draw all lines, and have those repainted that differ: few change with a token, of a large map."""
        width, height = self.size
        before, self._strips = self._strips, self._draw(width, height)
        changed = [y for y, strip in enumerate(self._strips) if y >= len(before) or strip != before[y]]
        if len(before) != len(self._strips):
            self.refresh()
        elif changed:
            self.refresh(*(Region(0, y, width, 1) for y in changed))

    def _draw(self, width: int, height: int) -> list[Strip]:
        """The grid from the top, and the details below it."""
        grid, base = self._grid, self._look.base
        room = max(0, height - self._details_lines)
        strips = []
        if grid is not None:
            columns = len(grid.cells[0]) if grid.cells else 1
            stretch = self._stretch(grid)
            colors = None if self.glyphs else self._colors(grid)
            for top in range(0, min(len(grid.cells), room * self._per_line), self._per_line):
                if colors is None:
                    row = [Segment("".join(GLYPHS[cell] * stretch for cell in grid.cells[top]), base)]
                else:
                    under = colors[top + 1] if top + 1 < len(colors) else (self._back(),) * columns
                    pairs = groupby(zip(colors[top], under, strict=True))
                    row = [Segment("▀" * stretch * len(list(some)), half_blocks(*pair)) for pair, some in pairs]
                strips.append(Strip(row).adjust_cell_length(width, base))
        texts = fold(self.details, width)[: self._details_lines]
        strips += [Strip([Segment(t[:width], base + self._look.dim)]).adjust_cell_length(width, base) for t in texts]
        return strips + [Strip.blank(width, base)] * (height - len(strips))

    def _colors(self, grid: Grid) -> list[list[str]]:
        """[row][column]."""
        palette = self._palette
        rows = [
            [palette.color(cell, share) for cell, share in zip(cells, shares, strict=True)]
            for cells, shares in zip(grid.cells, grid.shares, strict=True)
        ]
        if self.cursor is not None:
            row, column = self.cursor[0] // grid.layers_each, self.cursor[1] // grid.experts_each
            if row < len(rows) and column < len(rows[row]):
                rows[row][column] = palette.cursor
        return rows

    @property
    def _per_line(self) -> int:
        """Rows of cells in a line of the screen."""
        return 1 if self.glyphs else 2

    @property
    def _palette(self) -> Palette:
        theme = self.app.current_theme
        return palette(theme.dark, theme.ansi or self.app.console.color_system == "standard")

    @property
    def _details_lines(self) -> int:
        """Lines kept for the details, so that the grid stays where it is whatever they say."""
        return 1 if self.size.width >= 90 else 2 if self.size.width >= 56 else 3

    def _stretch(self, grid: Grid) -> int:
        """Columns of the screen for a cell: few experts fill the width, too."""
        columns = len(grid.cells[0]) if grid.cells else 1
        return max(1, min(4, self.size.width // max(1, columns)))

    def _back(self) -> str | None:
        color = self._look.base.bgcolor
        return color.get_truecolor().hex if color is not None else None


def fold(text: str, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` columns, broken where its parts end."""
    lines: list[str] = []
    for part in text.split(" · "):
        if lines and len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return lines
