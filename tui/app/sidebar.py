"""The live figures: at the side, or in one line where there is no room; and the map below them."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from textual.app import ComposeResult
from textual.containers import Vertical

from tui.app.look import Look
from tui.app.map_box import ExpertMap
from tui.app.panel_box import LineBox
from tui.figures import figures
from tui.panel import Line, compact, effect_lines, panel_lines

if TYPE_CHECKING:
    from tui.app.app import ChatApp

_HISTORY = 120
_ROOMY = 48
"""Lines of a screen on which the figures have blank lines among them, however large the map below them would be."""


class Sidebar(Vertical):
    """Shows what :class:`tui.figures.Figures` say. The curves have a point for each new state while tokens come."""

    DEFAULT_CSS = """
    Sidebar { width: 42; max-width: 60%; height: 100%; border-left: vkey $primary 30%; padding: 0 1; }
    Sidebar #panel { height: auto; }
    Sidebar ExpertMap { height: 1fr; margin: 1 0 0 0; }
    """

    def __init__(self, look: Look, id: str | None = None) -> None:
        super().__init__(id=id)
        self._look = look
        self._speeds: deque[float | None] = deque(maxlen=_HISTORY)
        self._hits: deque[float | None] = deque(maxlen=_HISTORY)
        self._tokens = 0
        self.effect_lines: list[Line] = []

    def compose(self) -> ComposeResult:
        yield LineBox(self._look, id="panel")
        yield ExpertMap(self._look, id="map")

    def show_map(self, shown: bool) -> None:
        self.query_one("#map").display = shown

    def forget(self) -> None:
        """Another model: the curves begin anew."""
        self._speeds.clear()
        self._hits.clear()
        self._tokens = 0

    def show(self, app: ChatApp) -> None:
        """Paint the app's snapshot."""
        snapshot, engine = app.snapshot, app.engine
        status = app.screen_stack[0].query_one("#status", LineBox)
        if snapshot is None or engine is None:
            status.show([compact(None, status.content_size.width)])
            self.query_one("#panel", LineBox).show([[("no model", "dim")]])
            return
        now = figures(snapshot, engine.context_tokens, app.begun)
        if snapshot.stats.new_tokens != self._tokens:
            self._tokens = snapshot.stats.new_tokens
            self._speeds.append(now.tokens_per_s)
            self._hits.append(now.window.hits if now.window else None)
        effect = app.comparison.effect(snapshot) if app.comparison is not None else None
        self.effect_lines = effect_lines(effect, 40)
        if not self.display:
            status.show([compact(now, status.content_size.width)])
            return
        panel = self.query_one("#panel", LineBox)
        width = max(20, panel.content_size.width)
        map = self.query_one("#map", ExpertMap)
        lines = panel_lines(now, list(self._speeds), list(self._hits), effect, width, roomy=True)
        below = map.lines_wanted(snapshot) + 1 if map.display else 0
        if app.size.height < _ROOMY and len(lines) + below > self.size.height:
            lines = panel_lines(now, list(self._speeds), list(self._hits), effect, width, roomy=False)
        panel.show(lines)
        if map.display:
            map.show(snapshot, engine.expert_score)
