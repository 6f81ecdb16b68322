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
