"""Small charts of plain text, the same on a terminal and in a pipe: bars, and curves with a letter for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_EIGHTHS = " ▏▎▍▌▋▊▉"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Curve:
    """``points`` are (x, y), by ascending x. ``dashed`` is for what is only there to compare with."""

    name: str
    points: tuple[tuple[float, float], ...]
    dashed: bool = False


def bar(value: float, most: float, width: int) -> str:
    """``value`` as a bar that is ``width`` characters long at ``most``."""
    eighths = round(8 * width * min(max(value, 0.0), most) / most) if most > 0 else 0
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def spark(values: Sequence[float | None], most: float) -> str:
    """One character for each value, as high as it is; a dot for what there is not."""
    levels = "▁▂▃▄▅▆▇█"
    return "".join("." if value is None else levels[min(7, int(8 * max(value, 0) / most))] for value in values)


def curves(series: Sequence[Curve], *, width: int = 64, height: int = 14, percent: bool = True) -> str:
    """A chart of lines: letters at the points (where several meet, the first), dots between, and a legend."""
    points = [point for curve in series for point in curve.points]
    if not points:
        return ""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    if high == low:
        low, high = low - 0.01, high + 0.01
    grid = [[" "] * width for _ in range(height)]

    def column(x: float) -> int:
        return round((x - left) / (right - left) * (width - 1)) if right > left else width // 2

    def row(y: float) -> int:
        return round((high - y) / (high - low) * (height - 1))

    for curve in series:
        for (x0, y0), (x1, y1) in zip(curve.points, curve.points[1:], strict=False):
            for at in range(column(x0) + 1, column(x1)):
                y = y0 + (y1 - y0) * (at - column(x0)) / (column(x1) - column(x0))
                if grid[row(y)][at] == " ":
                    grid[row(y)][at] = ":" if curve.dashed else "·"
    for number in range(len(series) - 1, -1, -1):
        for x, y in series[number].points:
            grid[row(y)][column(x)] = _LETTERS[number % len(_LETTERS)]
    labels = [_label(high - (high - low) * number / (height - 1), percent) for number in range(height)]
    margin = max(map(len, labels))
    lines = [
        f"{labels[number] if number % 3 == 0 or number == height - 1 else '':>{margin}} ┤{''.join(cells).rstrip()}"
        for number, cells in enumerate(grid)
    ]
    lines.append(" " * margin + " └" + "─" * width)
    lines.append(" " * (margin + 2) + _ticks(sorted({x for x, _ in points}), column, width))
    legend = [f"{_LETTERS[number % len(_LETTERS)]} {curve.name}" for number, curve in enumerate(series)]
    return "\n".join([*lines, *_wrapped(legend, margin + 2, width)]) + "\n"


def _label(value: float, percent: bool) -> str:
    return f"{100 * value:.1f} %" if percent else f"{value:.3g}"


def _ticks(values: Sequence[float], column: object, width: int) -> str:
    assert callable(column)
    line = ""
    for value in values:
        text = f"{100 * value:.3g} %"
        start = min(max(0, column(value) - len(text) // 2), width - len(text))
        if not line or start > len(line):
            line = line.ljust(start) + text
    return line


def _wrapped(parts: Sequence[str], margin: int, width: int) -> list[str]:
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + 3 <= margin + width:
            lines[-1] += f"   {part}"
        else:
            lines.append(" " * margin + part)
    return lines
