"""The live panel as lines of styled text: pure, so that what it says can be tested to the last digit."""

from __future__ import annotations

from collections.abc import Sequence

from offload.config import format_size
from tui.figures import Effect, Figures
from tui.status import figure, percent

Piece = tuple[str, str]
"""A text and how it looks: "" plain, "dim", "title", "good", "warm", "bad", or a colour by another name."""
Line = list[Piece]
_BARS = "▁▂▃▄▅▆▇█"
_LABEL = 12


def sparkline(values: Sequence[float | None], width: int, top: float | None = None) -> str:
    """The latest ``width`` values, each a bar between 0 and ``top`` (default: the largest of them)."""
    shown = list(values)[-width:]
    highest = top or max((value for value in shown if value is not None), default=0.0)
    if not highest:
        return ""
    return "".join(
        " " if value is None else _BARS[min(len(_BARS) - 1, int(value / highest * len(_BARS)))] for value in shown
    )


def bar(share: float, width: int, full: str = "━", empty: str = "─") -> str:
    filled = round(min(1.0, max(0.0, share)) * width)
    return full * filled + empty * (width - filled)


def compact(figures: Figures | None, width: int) -> Line:
    """One line for narrow screens: the figures that matter most, as many as fit."""
    if figures is None:
        return [("no model", "dim")]
    window, conversation = figures.window, figures.conversation
    parts = [
        f"{figure(figures.tokens_per_s)} tokens/s",
        f"hits {percent(window.hits if window else None)} ({percent(conversation.hits if conversation else None)})",
        f"context {figures.context_used} of {figures.context_tokens}",
        f"RAM {_used(figures.ram_used, figures.ram_budget)}",
        f"disk {figure(_mb(figures.disk_per_token), ' MB')} a token",
    ]
    if figures.vram_budget is not None:
        parts.insert(3, f"VRAM {_used(figures.vram_used, figures.vram_budget)}")
    while len(parts) > 1 and len(" · ".join(parts)) > width:
        parts.pop()
    return [(" · ".join(parts), "dim")]


def panel_lines(
    figures: Figures,
    speeds: Sequence[float | None],
    hits: Sequence[float | None],
    effect: Effect | None,
    width: int,
    roomy: bool = False,
) -> list[Line]:
    """All figures, ``width`` columns wide; ``roomy`` puts a blank line between the groups.

    Rows of a tier that does not exist are left out.
    """
    lines: list[Line] = [
        _title("Speed (simulated)" if figures.virtual else "Speed"),
        _row(
            "tokens/s", f"{figure(figures.tokens_per_s)} now, {figure(figures.mean_tokens_per_s)} mean", "good", width
        ),
        [(sparkline(speeds, width), "good")],
        _row("first token", figure(figures.ttft_s, " s", 2), "", width),
        *_meter("context", figures.context_used, figures.context_tokens, str, width),
        _title("Memory"),
    ]
    if figures.vram_budget is not None:
        lines += _meter("VRAM", figures.vram_used, figures.vram_budget, format_size, width)
    lines += _meter("RAM", figures.ram_used, figures.ram_budget, format_size, width)
    for tier in figures.tiers:
        lines.append(_row(f"{tier.name} slots", f"{tier.used} of {tier.slots} hold experts", "", width))
    window, conversation = figures.window, figures.conversation
    last = f"last {figures.window_tokens or 64}"
    lines += [
        _title("Experts"),
        _row("hit rate", f"{percent(window.hits if window else None)} {last}", "good", width),
        _row("", f"{percent(conversation.hits if conversation else None)} conversation", "", width),
        [(sparkline(hits, width, top=1.0), "good")],
        _row("pending", percent(window.pending if window else None), "warm", width),
        _row("misses", percent(window.misses if window else None), "bad", width),
    ]
    if len(figures.tiers) > 1:
        total = sum(tier.hits for tier in figures.tiers)
        for tier in figures.tiers:
            lines.append(_row(f"in {tier.name}", percent(tier.hits / total if total else None), "", width))
    if figures.computed_on_cpu is not None:
        lines.append(_row("on the CPU", f"{figures.computed_on_cpu} computed", "", width))
    lines.append(_row("disk", f"{figure(_mb(figures.disk_per_token), ' MB')} a token", "", width))
    if figures.has_link:
        lines.append(_row("link", f"{figure(_mb(figures.link_per_token), ' MB')} a token", "", width))
    if figures.prefetched:
        wasted = figures.prefetched - figures.prefetch_used
        lines.append(_row("prefetch", f"{figures.prefetch_used} used, {wasted} wasted", "", width))
    if figures.prefetch_auto is not None:
        lines.append(_row("auto", figures.prefetch_auto, "", width))
    lines += [
        _title("Time (simulated)" if figures.virtual else "Time"),
        *_time(figures, width),
        *effect_lines(effect, width),
    ]
    if not roomy:
        return lines
    return [part for line in lines for part in ([[], line] if line[0][1] == "title" else [line])]


def _time(figures: Figures, width: int) -> list[Line]:
    """Where the time of the latest tokens went: a bar and what its parts mean."""
    if figures.compute is None or figures.stall_disk is None:
        return [_row("", "-", "dim", width)]
    link = round((figures.stall_link or 0) * width)
    disk = round(figures.stall_disk * width)
    pieces: Line = [("█" * max(0, width - link - disk), "good"), ("█" * link, "warm"), ("█" * disk, "bad")]
    legend: Line = [(f"compute {percent(figures.compute)}", "good")]
    if figures.has_link:
        legend.append((f"  link {percent(figures.stall_link)}", "warm"))
    legend.append((f"  disk {percent(figures.stall_disk)}", "bad"))
    return [pieces, legend]


def effect_lines(effect: Effect | None, width: int) -> list[Line]:
    """What the latest change did; nothing without one."""
    if effect is None:
        return []

    def half(label: str, hits: float | None, speed: float | None) -> Line:
        return _row(label, f"{percent(hits)}, {figure(speed)} tokens/s", "", width)

    return [
        _title("Change"),
        [(effect.change[:width], "")],
        half("before", effect.hits_before, effect.speed_before),
        half("after", effect.hits_after, effect.speed_after),
        _row("", f"{effect.tokens} tokens since", "dim", width),
    ]


def _title(text: str) -> Line:
    return [(text, "title")]


def _row(label: str, value: str, style: str, width: int) -> Line:
    return [(f"{label:<{_LABEL}}", "dim"), (value[: max(0, width - _LABEL)], style)]


def _meter(label: str, used: int | None, limit: int, show: object, width: int) -> list[Line]:
    text = str if show is str else format_size
    if used is None:
        return [_row(label, f"- of {text(limit)}", "", width)]
    share = used / limit if limit else 0.0
    style = "bad" if share > 0.95 else "warm" if share > 0.8 else "good"
    room = width - _LABEL
    return [
        _row(label, f"{text(used)} of {text(limit)}", "", width),
        [(" " * _LABEL, ""), (bar(share, room), style)],
    ]


def _used(used: int | None, budget: int) -> str:
    return f"{'-' if used is None else format_size(used)} of {format_size(budget)}"


def _mb(size: float | None) -> float | None:
    return None if size is None else size / 1e6
