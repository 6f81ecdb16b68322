"""Blocks of Markdown and plain text as strips of a given width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import Heading, Markdown
from rich.segment import Segment
from rich.style import Style
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme
from textual.strip import Strip

from tui.app.blocks import Block
from tui.app.look import Look
from tui.text import printable


class Line(NamedTuple):
    """A line of the chat. ``act`` is what a click on it does, see :meth:`tui.app.transcript.Transcript.on_click`."""

    strip: Strip
    act: str = ""


class _Heading(Heading):
    """To the left and without a box: the chat is narrow."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _Markdown(Markdown):
    elements = Markdown.elements | {"heading_open": _Heading}


@dataclass(frozen=True, slots=True)
class Renderer:
    """Renders at ``width`` columns in ``look``."""

    look: Look
    width: int

    def text(self, text: str, style: Style, *, prefix: str = "", act: str = "") -> list[Line]:
        """Plain text, wrapped; ``prefix`` begins the first line, and the others are indented by as much."""
        body = Text(printable(text).expandtabs(4), style=style)
        rows = self._rows(body, self.width - len(prefix))
        lines = []
        for number, row in enumerate(rows):
            lead = prefix if number == 0 else " " * len(prefix)
            lines.append(self._line([Segment(lead, style), *row] if prefix else row, act))
        return lines

    def blank(self) -> Line:
        return self._line([])

    def block(self, block: Block, number: int) -> list[Line]:
        """A block, with a blank line before it unless it goes on with the one before; ``number`` is for copying it."""
        lines: list[Line] = []
        if block.first:
            lines.append(self.blank())
        if block.language is not None:
            return lines + self._code(block, number)
        markdown = _Markdown(printable(block.source), code_theme=self.look.code_theme, hyperlinks=False)
        return lines + [self._line(row) for row in _trimmed(self._rows(markdown, self.width))]

    def pieces(self, lines: Sequence[Sequence[tuple[str, str]]]) -> list[Line]:
        """Lines of :mod:`tui.panel`."""
        return [self._line([Segment(text, self.look.named(style)) for text, style in line]) for line in lines]

    def _code(self, block: Block, number: int) -> list[Line]:
        act = f"code:{number}"
        lines = []
        if block.first:
            head = Text(f" {block.language or 'text'}", Style(color=self.look.dim.color, dim=self.look.dim.dim))
            head.append("  click to copy", Style(dim=True, italic=True))
            lines += [self._line(row, act, self.look.code) for row in self._rows(head, self.width)]
        lexer = block.language or "text"
        code = Syntax(printable(block.source), lexer, theme=self.look.code_theme, word_wrap=True, tab_size=4)
        for row in self._rows(code, self.width - 2):
            # the theme's own background would be a third one beside the page's and the code's
            shown = [Segment(s.text, _without_background(s.style)) for s in row if not s.control]
            lines.append(self._line([Segment("  "), *shown], act, self.look.code))
        return lines

    def _rows(self, renderable: RenderableType, width: int) -> list[list[Segment]]:
        console = _console(self.look)
        options = console.options.update(width=max(8, width), height=None)
        return console.render_lines(renderable, options, pad=False)

    def _line(self, segments: Sequence[Segment], act: str = "", style: Style | None = None) -> Line:
        base = self.look.base + style if style else self.look.base
        strip = Strip(Segment.apply_style(segments, base)).adjust_cell_length(self.width, base)
        return Line(strip.simplify(), act)


def _trimmed(rows: list[list[Segment]]) -> list[list[Segment]]:
    """``rows`` without the blank ones that rich puts around tables."""
    shown = [any(segment.text.strip() for segment in row) for row in rows]
    if True not in shown:
        return []
    return rows[shown.index(True) : len(rows) - shown[::-1].index(True)]


@lru_cache(maxsize=8)
def _console(look: Look) -> Console:
    theme = Theme(
        {
            "markdown.h1": look.accent + Style(bold=True, underline=True),
            "markdown.h2": look.accent + Style(bold=True),
            "markdown.h3": Style(bold=True),
            "markdown.h4": Style(bold=True, italic=True),
            "markdown.code": look.accent + Style(bgcolor=look.code.bgcolor),
            "markdown.item.bullet": look.accent,
            "markdown.item.number": look.accent,
            "markdown.block_quote": look.dim,
            "markdown.link": look.accent + Style(underline=True),
            "markdown.link_url": look.accent + Style(underline=True),
            "markdown.hr": look.dim,
            "markdown.table.border": look.dim,
            "markdown.table.header": look.accent + Style(bold=True),
        }
    )
    return Console(
        width=80,
        theme=theme,
        color_system="truecolor",
        force_terminal=True,
        legacy_windows=False,
        highlight=False,
        markup=False,
        emoji=False,
    )


@lru_cache(maxsize=512)
def _without_background(style: Style | None) -> Style | None:
    if style is None or style.bgcolor is None:
        return style
    return Style(color=style.color, bold=style.bold, italic=style.italic, underline=style.underline)
