"""Tables for people and scripts: aligned columns of plain text, the same on a terminal and in a pipe."""

from __future__ import annotations

from collections.abc import Sequence

from tui.text import one_line


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """``rows`` as lines; the columns whose numbers are in ``right`` are aligned to the right."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    if not cells:
        return ""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        parts = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(parts).rstrip() + "\n")
    return "".join(lines)


def by_layer(values: Sequence[tuple[int, float]], each_row: int = 8) -> str:
    """Shares of 1 as percentages, some layers to a line, which starts with its first and last layer's number."""
    rows = []
    for start in range(0, len(values), each_row):
        some = values[start : start + each_row]
        cells = [f"{value:.2%}" for _, value in some]
        rows.append([f"layers {some[0][0]}-{some[-1][0]}", *cells, *[""] * (each_row - len(cells))])
    return table(rows, right=range(1, each_row + 1))
