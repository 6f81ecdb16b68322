"""Curves as an SVG picture, which every browser shows and any converter makes a PNG of."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tui.charts import Curve

_COLOURS = (
    "#1b6ca8",
    "#d1495b",
    "#2e933c",
    "#8d5a97",
    "#c77d0a",
    "#00798c",
    "#5c5346",
    "#b5179e",
    "#4361ee",
    "#6a994e",
)
_WIDTH, _HEIGHT = 860, 500
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 210, 48, 56


def curves_svg(series: Sequence[Curve], *, title: str, x_label: str, y_label: str, percent: bool = True) -> str:
    """The picture as text. x is a share, shown in percent; y as well unless ``percent`` is False."""
    points = [point for curve in series for point in curve.points]
    left, right = _range([x for x, _ in points], 0.0)
    low, high = _range([y for _, y in points], 0.04)
    inner_width, inner_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x_at(x: float) -> float:
        return _LEFT + (x - left) / (right - left) * inner_width

    def y_at(y: float) -> float:
        return _TOP + (high - y) / (high - low) * inner_height

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_LEFT, 26, title, 'font-size="15" font-weight="bold"'),
    ]
    for number in range(6):
        y = low + (high - low) * number / 5
        parts.append(_line(_LEFT, y_at(y), _LEFT + inner_width, y_at(y), 'stroke="#dddddd"'))
        label = f"{100 * y:.1f} %" if percent else f"{y:.3g}"
        parts.append(_text(_LEFT - 8, y_at(y) + 4, label, 'text-anchor="end"'))
    for x in sorted({x for x, _ in points}):
        parts.append(_line(x_at(x), _TOP + inner_height, x_at(x), _TOP + inner_height + 5, 'stroke="#444444"'))
        parts.append(_text(x_at(x), _TOP + inner_height + 20, f"{100 * x:.3g} %", 'text-anchor="middle"'))
    parts.append(
        f'<rect x="{_LEFT}" y="{_TOP}" width="{inner_width}" height="{inner_height}" fill="none" stroke="#444"/>'
    )
    parts.append(_text(_LEFT + inner_width / 2, _HEIGHT - 14, x_label, 'text-anchor="middle"'))
    middle = _TOP + inner_height / 2
    parts.append(_text(18, middle, y_label, f'text-anchor="middle" transform="rotate(-90 18 {middle:.1f})"'))
    for number, curve in enumerate(series):
        colour = "#222222" if curve.dashed else _COLOURS[number % len(_COLOURS)]
        style = f'stroke="{colour}" stroke-width="2" fill="none"' + (' stroke-dasharray="6 4"' if curve.dashed else "")
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in curve.points)
        parts.append(f'<polyline points="{path}" {style}/>')
        parts += [f'<circle cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3" fill="{colour}"/>' for x, y in curve.points]
        row = _TOP + 12 + 20 * number
        parts.append(_line(_WIDTH - _RIGHT + 16, row - 4, _WIDTH - _RIGHT + 40, row - 4, style))
        parts.append(_text(_WIDTH - _RIGHT + 46, row, curve.name, ""))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    least, most = min(values), max(values)
    if least == most:
        return least - 0.05, most + 0.05
    return least - margin * (most - least), most + margin * (most - least)


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _line(x0: float, y0: float, x1: float, y1: float, style: str) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" {style}/>'
