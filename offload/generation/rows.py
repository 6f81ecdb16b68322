"""Continuous batching: many rows share each forward pass, and the next row takes a finished one's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from offload.config import SamplingSettings
from offload.errors import Cancelled, RunLocalError
from offload.events import FinishReason, RowDone, RowEvent, RowsPass
from offload.generation.answer import AnswerForm, AnswerText
from offload.generation.sampling import Sampler
from offload.model.packed import Segment
from offload.model.row_cache import RowCaches
from offload.protocol import PreparedRow, TakeRow

MIN_SHARED = 16
"""Fewest tokens of a common beginning that are copied from another row instead of computed again."""


@dataclass(frozen=True, slots=True)
class PassPart:
    """What one row contributes to a forward pass: ``count`` of its tokens from position ``start`` on.

    ``decode``: the one token that was chosen last. ``ends``: the next token will be chosen from its logits.
    """

    row: int
    start: int
    count: int
    decode: bool
    ends: bool


RunPass = Callable[[list[Segment], list[PassPart]], torch.Tensor]
"""One forward pass: the logits of the last token of each segment, [segments, V]. Raises Cancelled or RunLocalError."""


class _Row:
    """One row in flight. ``cached`` of its ``tokens`` are in ``cache``; the rest is still to be run."""

    def __init__(self, number: int, prepared: PreparedRow, context: int, cache: DynamicCache, host: RowHost) -> None:
        self.number = number
        self.tokens = list(prepared.ids)
        self.prompt_tokens = len(prepared.ids)
        self.sampling: SamplingSettings = prepared.sampling
        self.limit = prepared.most_tokens(context)
        self.cache = cache
        self.cached = 0
        self.donor: _Row | None = None
        self.shared = 0
        self._sampler = host.sampler(prepared.sampling)
        self._stop_ids = host.stop_ids
        self._answer = AnswerText(host.tokenizer, host.form, prepared.ids, prepared.sampling.stop)
        self._decoding = host.decoding
        self._prepared: Future[None] | None = None

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    def prepare(self, drawing: ThreadPoolExecutor) -> None:
        """Have the next choice prepared meanwhile."""
        if self._prepared is None:
            self._prepared = drawing.submit(self._sampler.prepare)

    def choose(self, logits: torch.Tensor) -> FinishReason | None:
        """Take the next token; the reason if it was the last."""
        if self._prepared is not None:
            self._prepared.result()
            self._prepared = None
        with self._decoding:
            token = self._sampler(self.tokens, logits)
        self.tokens.append(token)
        ended = token in self._stop_ids and not self.sampling.ignore_eos
        self._answer.add(token, ended)
        if ended or self._answer.stopped:
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None

    def done(self, reason: FinishReason, error: str | None = None) -> RowDone:
        self._answer.flush()
        text, reasoning = self._answer.text, self._answer.reasoning
        return RowDone(self.number, reason, text, self.prompt_tokens, self.new_tokens, error, reasoning)


@dataclass(frozen=True, slots=True)
class RowHost:
    """What an engine lends to its rows, and what it wants to be told of: each row that is taken, each new token, and
    how many tokens of a row were copied from another. ``make_room`` tells of an error whether memory was used up and is
    to be had now. ``decoding`` surrounds the choice of a token.
    """

    tokenizer: Any
    form: AnswerForm
    stop_ids: frozenset[int]
    sampler: Callable[[SamplingSettings], Sampler]
    run: RunPass
    decoding: AbstractContextManager[None]
    make_room: Callable[[Exception], bool]
    cancelled: Callable[[], bool]
    on_admit: Callable[[PreparedRow], None]
    on_token: Callable[[], None]
    on_shared: Callable[[int], None]


class RowBatch:
    """Takes rows as there is room for them, and runs all in flight in one pass after the other.

    A pass holds the last token of every row that decodes and parts of the prompts of those that do not yet, together
    at most ``chunk`` tokens.
    """

    def __init__(self, host: RowHost, caches: RowCaches, rows: int, chunk: int, context: int) -> None:
        self._host = host
        self._caches = caches
        self._most = rows
        self._chunk = max(chunk, rows)
        self._context = context
        self._rows: list[_Row] = []
        self._kept: _Row | None = None  # a finished row whose beginning the next may share
        self._taken = 0
        self._drawing = ThreadPoolExecutor(1, "draws")  # its thread begins with the first work

    def run(self, take: TakeRow) -> Iterator[RowEvent]:
        """See :meth:`offload.protocol.RowEngine.generate_rows`."""
        try:
            while True:
                while len(self._rows) < self._most and (room := self._room()) > 1 and (row := take(room)) is not None:
                    self._admit(row)
                if not self._rows:
                    return
                yield from self._step()
                yield RowsPass(len(self._rows), sum(row.new_tokens for row in self._rows))
        except Cancelled:
            for flying in self._rows:
                yield flying.done("cancelled")
        finally:
            self._drawing.shutdown()
            self._rows.clear()
            self._kept = None
            self._caches.clear()

    def _room(self) -> int:
        """Tokens that the next row may have."""
        if self._host.cancelled():
            raise Cancelled
        if not self._rows:
            return self._context
        return min(self._context, self._caches.room(None if self._kept is None else self._kept.cache))

    def _admit(self, prepared: PreparedRow) -> None:
        tokens = prepared.most_tokens(self._context)
        if tokens > self._caches.room():
            self._release_kept()
        row = _Row(self._taken, prepared, self._context, self._caches.new(tokens), self._host)
        self._taken += 1
        self._find_donor(row)
        self._rows.append(row)
        self._host.on_admit(prepared)

    def _find_donor(self, row: _Row) -> None:
        """The row with the longest common beginning, if copying it pays."""
        for other in (*self._rows, *([self._kept] if self._kept else ())):
            common = _common(row.tokens[:-1], other.tokens[: other.prompt_tokens])
            if common >= MIN_SHARED and common > row.shared and self._caches.can_copy:
                row.donor, row.shared = other, common

    def _step(self) -> Iterator[RowDone]:
        """One forward pass, or one for each row where that fails."""
        for row in self._rows:
            self._take_shared(row)
        parts = self._parts()
        try:
            logits = self._run(parts)
        except Exception as error:
            if self._host.make_room(error):
                return  # the rows are where they were before
            if not isinstance(error, RunLocalError):
                raise
            if len(parts) == 1:
                yield self._fail(parts[0][0], error)
                return
            for row, count in parts:  # whose fault it is shows when each runs by itself
                try:
                    alone = self._run([(row, min(count, len(row.tokens) - row.cached))])
                except RunLocalError as own:
                    yield self._fail(row, own)
                else:
                    yield from self._choose(row, alone[0])
            return
        for (row, _), scores in zip(parts, logits, strict=True):
            yield from self._choose(row, scores)

    def _parts(self) -> list[tuple[_Row, int]]:
        """What runs next: rows and how many tokens of each, never none."""
        decoding = [row for row in self._rows if row.cached == len(row.tokens) - 1 and row.new_tokens]
        parts = [(row, 1) for row in decoding]
        left = self._chunk - len(parts)
        for row in self._rows:
            if left > 0 and row not in decoding and row.donor is None:
                count = min(left, len(row.tokens) - row.cached)
                parts.append((row, count))
                left -= count
        return parts

    def _run(self, parts: list[tuple[_Row, int]]) -> torch.Tensor:
        segments, about = [], []
        for row, count in parts:
            end = row.cached + count
            segments.append(Segment(row.cache, row.tokens[row.cached : end]))
            decode = row.new_tokens > 0 and count == 1
            about.append(PassPart(row.number, row.cached, count, decode, end == len(row.tokens)))
            if decode:
                row.prepare(self._drawing)  # beside the pass: for 16 rows it would take 5 % of its time afterwards
        try:
            logits = self._host.run(segments, about)
        except BaseException:
            for row, _ in parts:
                row.cached = self._caches.rewind(row.cache, row.cached)
            raise
        for row, count in parts:
            row.cached += count
        return logits

    def _choose(self, row: _Row, logits: torch.Tensor) -> Iterator[RowDone]:
        if row.cached < len(row.tokens):
            return
        reason = row.choose(logits)
        self._host.on_token()
        if reason is not None:
            yield self._finish(row, row.done(reason))

    def _fail(self, row: _Row, error: RunLocalError) -> RowDone:
        return self._finish(row, row.done("error", str(error)))

    def _finish(self, row: _Row, done: RowDone) -> RowDone:
        """Free the row's place; those that wait for its beginning get it, or compute it themselves."""
        self._rows.remove(row)
        for other in self._rows:
            if other.donor is row:
                self._take_shared(other)
                other.donor = None
        self._release_kept()
        if row.cached >= row.prompt_tokens:
            self._kept = row
        else:
            self._caches.release(row.cache)
        return done

    def _take_shared(self, row: _Row) -> None:
        donor = row.donor
        if donor is not None and donor.cached >= row.shared:
            self._caches.copy(donor.cache, row.cache, row.shared)
            row.cached, row.donor = row.shared, None
            self._host.on_shared(row.shared)

    def _release_kept(self) -> None:
        if self._kept is not None:
            self._caches.release(self._kept.cache)
            for row in self._rows:
                if row.donor is self._kept:
                    self._take_shared(row)
                    row.donor = None
            self._kept = None


def _common(ours: list[int], theirs: list[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            break
        count += 1
    return count
