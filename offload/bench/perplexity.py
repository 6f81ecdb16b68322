"""Perplexity of a model on a text, and the distance of its probabilities to those of a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from offload.bench.reference import (
    Evaluated,
    Piece,
    ReferenceReader,
    ReferenceWriter,
    divergence,
    take_piece,
    token_digest,
)
from offload.config import format_size
from offload.errors import RunLocalError, UsageError
from offload.events import LoadProgress, RunStats

if TYPE_CHECKING:
    from offload.engine import Engine

OnEvent = Callable[[LoadProgress], None]


@dataclass(frozen=True, slots=True)
class AgainstReference:
    """How far the model is from the reference, over the counted positions.

    ``exact``: the reference kept the whole vocabulary; else the KL is a lower bound.
    """

    perplexity_ratio: float
    mean_kl_nats: float
    top_token_agreement: float
    kept_tokens: int
    exact: bool


@dataclass(frozen=True, slots=True)
class PerplexityReport:
    """``tokens`` of the text were evaluated, ``counted_tokens`` of them predicted: not the first of each window."""

    right: ClassVar[tuple[int, ...]] = (1,)

    file: str
    tokens: int
    counted_tokens: int
    windows: int
    window_tokens: int
    mean_nll_nats: float
    reference: AgainstReference | None
    stats: RunStats

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean_nll_nats)

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "tokens": self.tokens,
            "counted_tokens": self.counted_tokens,
            "windows": self.windows,
            "window_tokens": self.window_tokens,
            "mean_nll_nats": self.mean_nll_nats,
            "perplexity": self.perplexity,
            "reference": self.reference and asdict(self.reference),
            "stats": self.stats.to_json(),
        }

    def summary(self) -> list[str]:
        return [f"{self.stats.model} on {self.stats.device}, format {self.stats.format}: {self.file}"]

    def rows(self) -> list[tuple[str, ...]]:
        rate, memory = self.stats.prefill_tokens_per_s, self.stats.memory
        rows: list[tuple[str, ...]] = [
            ("tokens", str(self.tokens), f"in {self.windows} windows of at most {self.window_tokens} (--ctx)"),
            ("counted", str(self.counted_tokens), "all but the first of each window"),
            ("mean negative log likelihood", f"{self.mean_nll_nats:.5f}", "nats"),
            ("perplexity", f"{self.perplexity:.4f}", ""),
        ]
        if self.reference is not None:
            found = self.reference
            bound = "" if found.exact else f", at least: the likeliest {found.kept_tokens} tokens one by one"
            rows += [
                ("ratio to the reference", f"{found.perplexity_ratio:.4f}", "of perplexities"),
                ("mean KL(reference || this)", f"{found.mean_kl_nats:.6f}", f"nats{bound}"),
                ("same top token", f"{100 * found.top_token_agreement:.2f} %", "of the positions"),
            ]
        rows.append(("speed", "-" if rate is None else f"{rate:.2f}", "tokens/s"))
        rows.append(("peak memory", format_size(memory.rss_peak_bytes), f"of {format_size(memory.ram_budget_bytes)}"))
        return rows


def evaluate(
    engine: Engine,
    text: str,
    name: str,
    tokens: int | None,
    reference: Path | None,
    reference_out: Path | None,
    on_event: OnEvent,
) -> PerplexityReport:
    """Perplexity on the first ``tokens`` tokens of ``text``, which comes from a file called ``name``.

    ``reference_out`` is written for another run, ``reference`` is what such a run wrote; at most one of them is given.
    Raises UsageError if there are fewer than two tokens or ``reference`` has others, RunLocalError if the model
    computes no numbers or a file cannot be used.
    """
    ids = engine.encode(text)[:tokens]
    begin = engine.begin_id
    windows = cut_windows(ids, engine.score_tokens, begin)
    if not windows:
        raise UsageError(f"--perplexity: {name} gives {len(ids)} tokens with this tokenizer; at least 2 are needed")
    counted = sum(len(window) - 1 for window in windows)
    evaluated = Evaluated(engine.model_name, engine.vocabulary, engine.score_tokens, counted, token_digest(windows))
    sums = _Sums()
    with ExitStack() as files:
        reader = None if reference is None else files.enter_context(ReferenceReader(reference, evaluated))
        writer = None if reference_out is None else files.enter_context(ReferenceWriter(reference_out, evaluated))
        kept = evaluated.kept if writer is not None else 1
        for piece in _pieces(engine, windows, reader, kept, sums):
            if writer is not None:
                writer.add(piece)
            on_event(LoadProgress("perplexity", sums.positions, counted, "steps"))
    mean = sums.nll / counted
    if not math.isfinite(mean) or mean > math.log(1e300):
        raise RunLocalError(f"the model computes no probabilities for this text (mean negative log likelihood {mean})")
    against = None
    if reader is not None:
        against = AgainstReference(
            math.exp(mean - sums.reference_nll / counted),
            sums.kl / counted,
            sums.agreed / counted,
            evaluated.kept,
            evaluated.kept == evaluated.vocabulary,
        )
    return PerplexityReport(name, len(ids), counted, len(windows), engine.score_tokens, mean, against, engine.stats())


def cut_windows(ids: list[int], size: int, begin: int | None = None) -> list[list[int]]:
    """``ids`` in windows of at most ``size`` tokens; one that is left with a single token is dropped.

    ``begin``, which the tokenizer puts before every text, is put before every window: some models are lost without it.
    """
    head = [begin] if begin is not None and ids[:1] == [begin] else []
    body, step = ids[len(head) :], size - len(head)
    windows = [head + body[start : start + step] for start in range(0, len(body), max(1, step))]
    return [window for window in windows if len(window) >= 2]


@dataclass(slots=True)
class _Sums:
    """Over all positions so far, in nats."""

    positions: int = 0
    nll: float = 0.0
    reference_nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def add(self, piece: Piece, reference: Piece | None) -> None:
        self.positions += len(piece.next)
        self.nll -= float(piece.next.double().sum())
        if reference is not None:
            self.reference_nll -= float(reference.next.double().sum())
            self.kl += float(divergence(reference, piece).sum())
            self.agreed += int((reference.top == piece.top).sum())


def _pieces(
    engine: Engine, windows: list[list[int]], reader: ReferenceReader | None, kept: int, sums: _Sums
) -> Iterator[Piece]:
    """Score ``windows`` and add each piece to ``sums``."""
    for window in windows:
        targets = torch.tensor(window[1:])
        at = 0
        for logits in engine.score(window[:-1]):  # nothing follows the last token
            count = len(logits)
            reference = None if reader is None else reader.next(count)
            with torch.inference_mode():
                piece = take_piece(logits, targets[at : at + count], kept if reference is None else reference.ids)
                sums.add(piece, reference)
            at += count
            yield piece
