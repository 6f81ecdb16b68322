"""The map of all experts: half a line for each row of cells, lit as they are used, with details under the cursor."""

from __future__ import annotations

from collections.abc import Callable

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding
from textual.geometry import Size
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from offload.events import CacheSnapshot
from tui.app.look import Look
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

    @property
    def glyphs(self) -> bool:
        """Whether it draws letters: without colours, or with the sixteen that every terminal has its own of."""
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
            for piece in (("■ ", self._cell_color(cell, 1.0)), (f"{text}  ", ""))
        ]

    def set_look(self, look: Look) -> None:
        self._look = look
        self.refresh()

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
        per_line = 1 if self.glyphs else 2
        row, column = event.y * per_line, event.x // self._stretch(grid)
        if row < len(grid.cells) and column < len(grid.cells[0]):
            self.cursor = (row * grid.layers_each, column * grid.experts_each)

    def watch_cursor(self) -> None:
        self.refresh()

    def render_line(self, y: int) -> Strip:
        grid, width, base = self._grid, self.size.width, self._look.base
        per_line = 1 if self.glyphs else 2
        rows = -(-len(grid.cells) // per_line) if grid is not None else 0
        if (line := y - min(rows, self.size.height - self._details_lines)) >= 0:
            lines = fold(self.details, width)
            text = lines[line] if line < len(lines) else ""
            return Strip([Segment(text[:width], base + self._look.dim)]).adjust_cell_length(width, base)
        if grid is None:
            return Strip.blank(width, base)
        stretch = self._stretch(grid)
        if self.glyphs:
            if y >= len(grid.cells):
                return Strip.blank(width, base)
            text = "".join(GLYPHS[cell] * stretch for cell in grid.cells[y])
            return Strip([Segment(text, base)]).adjust_cell_length(width, base)
        top, bottom = 2 * y, 2 * y + 1
        if top >= len(grid.cells):
            return Strip.blank(width, base)
        segments = []
        for column in range(len(grid.cells[top])):
            upper = self._color(grid, top, column)
            lower = self._color(grid, bottom, column) if bottom < len(grid.cells) else None
            style = Style(color=upper, bgcolor=lower) if lower else Style(color=upper, bgcolor=self._back())
            segments.append(Segment("▀" * stretch, style))
        return Strip(segments).simplify().adjust_cell_length(width, base)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return 10

    def _make(self) -> None:
        if self._snapshot is None or self.size.width < 1:
            return
        lines = max(1, self.size.height - self._details_lines)
        self._grid = make_grid(self._snapshot, lines * (1 if self.glyphs else 2), self.size.width)
        self.refresh()

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

    def _color(self, grid: Grid, row: int, column: int) -> str:
        """Its state's; of a resident cell the more of the blue, the larger its resident share."""
        cell, share = grid.cells[row][column], grid.shares[row][column]
        if self.cursor is not None:
            at = (self.cursor[0] // grid.layers_each, self.cursor[1] // grid.experts_each)
            if at == (row, column):
                return "#ffffff" if self._dark() else "#000000"
        return self._cell_color(cell, share)

    def _cell_color(self, cell: Cell, share: float) -> str:
        if cell is Cell.RESIDENT:
            low, high = ((38, 48, 84), (76, 108, 196)) if self._dark() else ((206, 216, 242), (96, 128, 210))
            return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))
        fixed = {
            Cell.ABSENT: "#24283a" if self._dark() else "#e3e6f0",
            Cell.HOSTED: "#4a3a66" if self._dark() else "#d9c8ee",
            Cell.LOADING: "#e0af68",
            Cell.HIT: "#9ece6a" if self._dark() else "#3f9c3a",
            Cell.MISSED: "#f7768e" if self._dark() else "#d03a3a",
        }
        return fixed[cell]

    def _dark(self) -> bool:
        return self.app.current_theme.dark


def fold(text: str, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` columns, broken where its parts end."""
    lines: list[str] = []
    for part in text.split(" · "):
        if lines and len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return lines
