"""The figures of the live panel, out of the engine's snapshot. What was not measured is None."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload.events import CacheSnapshot, ExpertStats, RunStats, TierUse, TokenSample

NOW_TOKENS = 8
"""Over how many of the latest tokens the speed "now" is taken."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Shares of accesses."""

    hits: float
    pending: float
    misses: float


@dataclass(frozen=True, slots=True)
class Figures:
    """``conversation`` are the rates since it began; ``window_tokens`` are those that ``window`` and the shares of time
    are taken over. Memory that a tier does not have is None in used and budget alike. ``virtual``: times are those of
    a simulated machine. ``prefetch_auto`` is what ``--prefetch auto`` found, if that is chosen.
    """

    tokens_per_s: float | None
    mean_tokens_per_s: float | None
    ttft_s: float | None
    context_used: int
    context_tokens: int
    ram_used: int
    ram_budget: int
    vram_used: int | None
    vram_budget: int | None
    tiers: Sequence[TierUse]
    window: Rates | None
    window_tokens: int
    conversation: Rates | None
    disk_per_token: float | None
    link_per_token: float | None
    compute: float | None
    stall_disk: float | None
    stall_link: float | None
    prefetched: int
    prefetch_used: int
    prefetch_auto: str | None
    computed_on_cpu: int | None
    has_link: bool
    virtual: bool = False


def rates(hits: int, pending: int, misses: int) -> Rates | None:
    """None before the first access."""
    total = hits + pending + misses
    return Rates(hits / total, pending / total, misses / total) if total else None


def since(stats: ExpertStats, before: ExpertStats | None) -> Rates | None:
    """The rates of what came on top of ``before``."""
    if before is None:
        return rates(stats.hits, stats.pending, stats.misses)
    return rates(stats.hits - before.hits, stats.pending - before.pending, stats.misses - before.misses)


def speed(tokens: Sequence[TokenSample]) -> float | None:
    """Tokens a second of these passes."""
    seconds = sum(token.seconds for token in tokens)
    return len(tokens) / seconds if seconds else None


def window_rates(tokens: Sequence[TokenSample]) -> Rates | None:
    sums = [(token.hits, token.pending, token.misses) for token in tokens]
    return rates(*(sum(column) for column in zip(*sums, strict=True))) if sums else None


def figures(snapshot: CacheSnapshot, context_tokens: int, begun: RunStats | None = None) -> Figures:
    """``begun``: the statistics when the conversation began; None if it began with the session."""
    stats, recent = snapshot.stats, snapshot.recent
    seconds = sum(token.seconds for token in recent)
    disk = sum(token.stall_disk for token in recent) / seconds if seconds else None
    has_link = stats.memory.vram_budget_bytes is not None
    stalls = [token.stall_link for token in recent if token.stall_link is not None]
    link = sum(stalls) / seconds if seconds and stalls else None
    moved = [token.link_bytes for token in recent if token.link_bytes is not None]
    return Figures(
        tokens_per_s=speed(recent[-NOW_TOKENS:]),
        mean_tokens_per_s=stats.decode_tokens_per_s,
        ttft_s=snapshot.ttft_s,
        context_used=snapshot.context_used,
        context_tokens=context_tokens,
        ram_used=snapshot.rss_bytes,
        ram_budget=stats.memory.ram_budget_bytes,
        vram_used=snapshot.vram_bytes,
        vram_budget=stats.memory.vram_budget_bytes,
        tiers=snapshot.tiers,
        window=window_rates(recent),
        window_tokens=len(recent),
        conversation=since(stats.experts, begun.experts if begun else None),
        disk_per_token=sum(token.disk_bytes for token in recent) / len(recent) if recent else None,
        link_per_token=sum(moved) / len(recent) if moved else None,
        compute=None if disk is None else max(0.0, 1 - disk - (link or 0)),
        stall_disk=disk,
        stall_link=link,
        prefetched=stats.experts.prefetched,
        prefetch_used=stats.experts.prefetch_used,
        prefetch_auto=stats.prefetch_auto.describe() if stats.prefetch_auto is not None else None,
        computed_on_cpu=stats.experts.computed_on_cpu,
        has_link=has_link,
        virtual=stats.virtual,
    )


@dataclass(frozen=True, slots=True)
class Effect:
    """What a change did: the hit rate and speed of the tokens before it, and of those ``tokens`` since."""

    change: str
    hits_before: float | None
    speed_before: float | None
    hits_after: float | None
    speed_after: float | None
    tokens: int


class Comparison:
    """Begins at a change and compares what comes after with the latest tokens before."""

    def __init__(self, change: str, before: CacheSnapshot) -> None:
        self._change = change
        self._before = before
        window = window_rates(before.recent)
        self._hits = window.hits if window else None
        self._speed = speed(before.recent)

    def effect(self, now: CacheSnapshot) -> Effect:
        """Over all tokens since the change; the hit rate is that of decoding and prefill together."""
        rates_after = since(now.stats.experts, self._before.stats.experts)
        tokens = max(0, now.stats.new_tokens - self._before.stats.new_tokens)
        after = now.recent[-tokens:] if tokens else ()
        hits = window_rates(after) if len(after) == tokens and tokens else rates_after
        return Effect(self._change, self._hits, self._speed, hits.hits if hits else None, speed(after), tokens)
