"""From the app's theme to the styles that rich renders with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.color import Color
from rich.style import Style
from textual.theme import Theme

from tui.settings import THEMES

DARK = Theme(
    name="run-local-dark",
    primary="#7aa2f7",
    secondary="#bb9af7",
    accent="#7dcfff",
    success="#9ece6a",
    warning="#e0af68",
    error="#f7768e",
    foreground="#c8d0e0",
    background="#14161f",
    surface="#1a1d29",
    panel="#222636",
    dark=True,
)
LIGHT = Theme(
    name="run-local-light",
    primary="#2456b8",
    secondary="#7a3fb0",
    accent="#0b6e8f",
    success="#2f7d32",
    warning="#9a6200",
    error="#b3261e",
    foreground="#1f2430",
    background="#fbfbfd",
    surface="#f1f2f6",
    panel="#e4e6ee",
    dark=False,
)
_NAMES = {"dark": DARK.name, "light": LIGHT.name, "ansi-dark": "ansi-dark", "ansi-light": "ansi-light"}


def theme_name(setting: str, environ: Mapping[str, str] = os.environ) -> str:
    """Textual's name of a theme of :data:`tui.settings.THEMES`. Automatic: light where the terminal says it is, and the
    terminal's own colours where it has but sixteen. They also stand in for any theme under ``NO_COLOR``: Textual
    turns all others to greys, which are colours, too.

    ``COLORFGBG`` is what some terminals say: foreground;background, with 7 and 15 for white.
    """
    assert setting in THEMES
    if setting == "auto":
        light = environ.get("COLORFGBG", "").rpartition(";")[2] in ("7", "15")
        setting = "light" if light else "dark"
        if has_few_colors(environ):
            setting = f"ansi-{setting}"
    if "NO_COLOR" in environ and not setting.startswith("ansi-"):
        setting = f"ansi-{setting}"
    return _NAMES[setting]


def has_few_colors(environ: Mapping[str, str]) -> bool:
    """Whether the terminal has sixteen colours at most, by what rich goes by."""
    many = environ.get("COLORTERM", "").strip().lower() in ("truecolor", "24bit")
    return not many and not environ.get("TERM", "").lower().endswith(("-256color", "kitty"))


_COLOR = "color:"


def color_name(color: str) -> str:
    """The name of the style that is nothing but this colour."""
    return _COLOR + color


@dataclass(frozen=True, slots=True)
class Look:
    """Styles of one theme. ``code_theme`` is a name that pygments or rich knows."""

    base: Style
    accent: Style
    dim: Style
    good: Style
    warm: Style
    bad: Style
    code: Style
    code_theme: str

    def named(self, name: str) -> Style:
        """The style of a piece of :mod:`tui.panel`, or of what :func:`color_name` gives."""
        if name.startswith(_COLOR):
            return self.base + Style(color=name.removeprefix(_COLOR))
        styles = {
            "": self.base,
            "dim": self.dim,
            "title": self.base + self.accent + Style(bold=True),
            "good": self.base + self.good,
            "warm": self.base + self.warm,
            "bad": self.base + self.bad,
        }
        return styles[name]


def make_look(variables: Mapping[str, str], theme: Theme) -> Look:
    """``variables`` are the theme's computed ones."""

    def color(name: str, fallback: str) -> Any:
        value = variables.get(name) or fallback
        if value.startswith("ansi_"):
            return Color.parse(value.removeprefix("ansi_"))
        return Color.parse(value.split()[0]) if value.startswith("#") else Color.parse(fallback)

    if theme.ansi:
        base, code = Style(), Style()
        return Look(
            base,
            Style(color=color("primary", "blue")),
            Style(dim=True),
            Style(color="green"),
            Style(color="yellow"),
            Style(color="red"),
            code,
            "ansi_dark" if theme.dark else "ansi_light",
        )
    base = Style(color=color("foreground", "#e0e0e0"), bgcolor=color("background", "#101010"))
    return Look(
        base,
        Style(color=color("primary", "#7aa2f7")),
        Style(color="#7f879c" if theme.dark else "#666d7e", bgcolor=base.bgcolor),
        Style(color=color("success", "#9ece6a")),
        Style(color=color("warning", "#e0af68")),
        Style(color=color("error", "#f7768e")),
        Style(color=color("foreground", "#e0e0e0"), bgcolor=color("surface", "#1a1d29")),
        "one-dark" if theme.dark else "default",
    )
