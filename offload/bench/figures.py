"""The figures of one measured generation: names with units for JSON, labels and formats for people. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from offload.config import format_size
from offload.events import RunStats
from offload.memory.work import Rates, Work, bound

Figures = dict[str, float | None]
"""By name, as :data:`TABLE` has them; None is what was not measured."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure as people see it."""

    name: str
    label: str
    show: Callable[[float], str]

    def text(self, value: float | None) -> str:
        return "-" if value is None else self.show(value)


def _number(unit: str, digits: int = 2) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}{unit}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _rate(value: float) -> str:
    return f"{format_size(value)}/s"


TABLE: tuple[Figure, ...] = (
    Figure("start_s", "process start to a loaded model", _number(" s")),
    Figure("process_to_first_token_s", "process start to first token", _number(" s")),
    Figure("ttft_s", "request to first token", _number(" s")),
    Figure("prefill_tokens_per_s", "prefill", _number(" tokens/s")),
    Figure("warmup_tokens_per_s", "decode, warm-up", _number(" tokens/s")),
    Figure("decode_tokens_per_s", "decode, measured", _number(" tokens/s")),
    Figure("ms_per_token", "time per measured token", _number(" ms")),
    Figure("compute_ms_per_token", "of it the model's computing", _number(" ms")),
    Figure("stall_ms_per_token", "of it waiting for reads", _number(" ms")),
    Figure("other_ms_per_token", "of it sampling, text and events", _number(" ms")),
    Figure("prefill_hit_rate", "hit rate, prefill", _percent),
    Figure("warmup_hit_rate", "hit rate, warm-up", _percent),
    Figure("decode_hit_rate", "hit rate, measured", _percent),
    Figure("disk_bytes_per_token", "read from disk per measured token", format_size),
    Figure("disk_bytes_per_s", "disk rate while a read was running", _rate),
    Figure("prefill_s", "prefill, forward passes", _number(" s", 3)),
    Figure("prefill_bound_s", "  the bound: reads or arithmetic alone", _number(" s", 3)),
    Figure("prefill_to_bound", "  prefill to its bound", _number(" x")),
    Figure("decode_bound_tokens_per_s", "decode, the bound", _number(" tokens/s")),
    Figure("decode_to_bound", "  decode to its bound", _number(" x")),
    Figure("prefill_read_ratio", "read of what was needed and not held, prefill", _number(" x", 3)),
    Figure("decode_read_ratio", "read of what was needed and not held, measured", _number(" x", 3)),
    Figure("compute_calls_per_event", "kernel calls per event, measured", _number("")),
    Figure("rss_peak_bytes", "peak memory", format_size),
)


@dataclass(frozen=True, slots=True)
class BenchRun:
    """One generation in three laps. ``to_first_token_s`` counts from the start of the process; None after the first."""

    seed: int
    prefill: RunStats
    warmup: RunStats
    measured: RunStats
    to_first_token_s: float | None
    work: Work | None = None
    rates: Rates | None = None

    @property
    def stats(self) -> RunStats:
        """Statistics of the measured part, with the prompt's own figures beside them."""
        return replace(
            self.measured,
            prompt_tokens=self.prefill.prompt_tokens,
            ttft_s=self.prefill.ttft_s,
            prefill_tokens_per_s=self.prefill.prefill_tokens_per_s,
        )

    def figures(self) -> Figures:
        measured = self.measured
        tokens, rate = measured.new_tokens, measured.decode_tokens_per_s
        total = _per_token(measured.seconds.total, tokens)
        stall = _per_token(measured.seconds.stall_disk, tokens)
        forward = None if rate is None else 1000 / rate  # one pass for each measured token
        prefill = ratio(self.prefill.prefilled_tokens, self.prefill.prefill_tokens_per_s)
        prefill_bound = self._bound(self.prefill, self.prefill.prefill_passes, self.prefill.prefilled_tokens)
        decode_bound = ratio(tokens, self._bound(measured, measured.decode_passes, tokens))
        return {
            "prefill_s": prefill,
            "prefill_bound_s": prefill_bound,
            "prefill_to_bound": ratio(prefill, prefill_bound),
            "decode_bound_tokens_per_s": decode_bound,
            "decode_to_bound": ratio(rate, decode_bound),
            "prefill_read_ratio": ratio(self.prefill.bytes.disk_read, self.prefill.bytes.needed),
            "decode_read_ratio": ratio(measured.bytes.disk_read, measured.bytes.needed),
            "start_s": measured.start_s,
            "process_to_first_token_s": self.to_first_token_s,
            "ttft_s": self.prefill.ttft_s,
            "prefill_tokens_per_s": self.prefill.prefill_tokens_per_s,
            "warmup_tokens_per_s": self.warmup.decode_tokens_per_s,
            "decode_tokens_per_s": rate,
            "ms_per_token": total,
            "compute_ms_per_token": _difference(forward, stall),
            "stall_ms_per_token": stall,
            "other_ms_per_token": _difference(total, forward),
            "prefill_hit_rate": self.prefill.experts.hit_rate,
            "warmup_hit_rate": self.warmup.experts.decode_hit_rate,
            "decode_hit_rate": measured.experts.decode_hit_rate,
            "disk_bytes_per_token": measured.bytes.per_decode_token,
            "disk_bytes_per_s": ratio(measured.bytes.disk_read, measured.seconds.disk_busy),
            "compute_calls_per_event": ratio(measured.experts.compute_calls, measured.experts.events),
            "rss_peak_bytes": measured.memory.rss_peak_bytes,
        }

    def _bound(self, part: RunStats, passes: int, tokens: int) -> float | None:
        """Seconds that ``part`` takes at least; None without rates of this machine."""
        if self.work is None or self.rates is None or part.bytes.needed is None or not passes:
            return None
        return bound(
            self.work,
            self.rates,
            needed_bytes=part.bytes.needed,
            passes=passes,
            accesses=part.experts.accesses,
            tokens=tokens,
        ).seconds


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and most of what was measured."""

    median: float
    min: float
    max: float


def spread(values: Iterable[float | None]) -> Spread | None:
    """None if nothing was measured."""
    known = [value for value in values if value is not None]
    return Spread(statistics.median(known), min(known), max(known)) if known else None


def spreads(runs: Sequence[Figures]) -> dict[str, Spread | None]:
    """Of each figure over ``runs``."""
    return {figure.name: spread(run.get(figure.name) for run in runs) for figure in TABLE}


def ratio(top: float | None, bottom: float | None) -> float | None:
    return None if top is None or not bottom else top / bottom


def _per_token(seconds: float, tokens: int) -> float | None:
    """Milliseconds."""
    return ratio(1000 * seconds, tokens)


def _difference(whole: float | None, part: float | None) -> float | None:
    return None if whole is None or part is None else whole - part
