"""The colours of the map of experts: the project's own, or the sixteen that every terminal has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from rich.style import Style

from tui.expert_map import Cell

_SHADES = 16


@dataclass(frozen=True, slots=True)
class Palette:
    """Colours as rich names them. ``shades`` are those of a cell of which some to all experts are resident."""

    absent: str
    hosted: str
    loading: str
    hit: str
    missed: str
    shades: tuple[str, ...]
    cursor: str

    def color(self, cell: Cell, share: float) -> str:
        """Of a cell whose resident experts are ``share`` of all."""
        if cell is Cell.RESIDENT:
            return self.shades[round(share * (len(self.shades) - 1))]
        fixed = (self.absent, self.hosted, "", self.loading, self.hit, self.missed)
        return fixed[cell]


def _shaded(low: tuple[int, int, int], high: tuple[int, int, int]) -> tuple[str, ...]:
    steps = [step / (_SHADES - 1) for step in range(_SHADES)]
    return tuple("#" + "".join(f"{round(a + (b - a) * s):02x}" for a, b in zip(low, high, strict=True)) for s in steps)


_DARK = Palette("#24283a", "#4a3a66", "#e0af68", "#9ece6a", "#f7768e", _shaded((38, 48, 84), (76, 108, 196)), "#ffffff")
_LIGHT = Palette(
    "#e3e6f0", "#d9c8ee", "#c98a1b", "#3f9c3a", "#d03a3a", _shaded((206, 216, 242), (96, 128, 210)), "#000000"
)
_ANSI_DARK = Palette("bright_black", "magenta", "yellow", "green", "red", ("blue", "bright_blue"), "bright_white")
_ANSI_LIGHT = Palette("white", "magenta", "yellow", "green", "red", ("bright_blue", "blue"), "black")


def palette(dark: bool, ansi: bool) -> Palette:
    """``ansi``: nothing but the terminal's own sixteen colours."""
    if ansi:
        return _ANSI_DARK if dark else _ANSI_LIGHT
    return _DARK if dark else _LIGHT


@lru_cache(maxsize=1024)
def half_blocks(upper: str, lower: str | None) -> Style:
    """The style of an upper half block between two colours."""
    return Style(color=upper, bgcolor=lower)
