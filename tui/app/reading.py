"""Tables to read: the statistics of the session and the memory plan, as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from offload.config import format_size
from offload.errors import UsageError

if TYPE_CHECKING:
    from tui.app.app import ChatApp


def statistics(app: ChatApp) -> str:
    """All figures of ``--stats-json`` so far. Raises UsageError without a model."""
    if app.engine is None:
        raise UsageError("no model is loaded; /models or F6 chooses one")
    rows = ["| figure | value |", "| --- | --- |"]
    for name, value in app.engine.snapshot().stats.to_json().items():
        inner: dict[str, Any] = value if isinstance(value, dict) else {"": value}
        for part, figure in inner.items():
            rows.append(f"| {' '.join(filter(None, (name, part)))} | {_shown(part or name, figure)} |")
    return "\n".join(rows)


def plan(app: ChatApp) -> str:
    """The plan that the engine was opened with. Raises UsageError if there is none."""
    if app.plan is None:
        raise UsageError("no model is loaded; /models or F6 chooses one")
    rows = ["| what | size | |", "| --- | ---: | --- |"]
    rows += [f"| {what} | {format_size(size)} | {remark} |" for what, size, remark in app.plan.rows]
    return "\n".join(["  \n".join(app.plan.summary), "", *rows])


def _shown(name: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and name.endswith("bytes"):
        return format_size(value)
    return str(value)
