"""The line of figures after each answer. What was not measured is '-', never 0."""

from __future__ import annotations

from offload.config import format_size
from offload.events import Done
from offload.protocol import ChatEngine


def figure(value: float | None, unit: str = "", digits: int = 1) -> str:
    """``12.3 unit``, or '-' for what was not measured."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f} %"


def status_line(done: Done, engine: ChatEngine) -> str:
    """Speed, cache and memory of one turn; the hit rate also over the whole session."""
    stats = done.stats
    read = stats.bytes.per_decode_token
    return " | ".join(
        (
            f"{figure(stats.decode_tokens_per_s)} tokens/s{' (simulated)' if stats.virtual else ''}",
            f"first token {figure(stats.ttft_s, ' s', 2)}",
            f"hit rate {percent(stats.experts.hit_rate)} (session {percent(engine.stats().experts.hit_rate)})",
            f"read {figure(None if read is None else read / 1e6, ' MB')} a token",
            f"RSS {format_size(engine.rss_bytes())} of {format_size(engine.ram_budget_bytes)}",
            f"context {done.prompt_tokens + done.new_tokens} of {engine.context_tokens}",
        )
    )
