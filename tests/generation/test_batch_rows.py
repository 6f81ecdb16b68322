"""Batches over a scripted engine whose rows share passes: order, errors, interrupts and resume, with no model."""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from offload.config import SamplingSettings
from offload.errors import ContextError, RunLocalError, UsageError
from offload.events import BatchProgress, Event, Notice, RowDone, RowEvent, RowsPass
from offload.generation.batch_run import BatchOptions, BatchSummary, run_batch
from offload.protocol import Message, PreparedRow, RowEngine, TakeRow
from tests.tui.fake_engine import FakeEngine

SAMPLING = SamplingSettings(max_new_tokens=4)


@dataclass
class FakeRows(FakeEngine):
    """Answers row by row with its prompt in capitals, a letter for each pass; "bad" rows fail. Room in tokens."""

    rows_at_once: int = 3
    pool: int = 10_000
    passes: int = 0
    widest: int = 0
    begun: list[str] = field(default_factory=list)
    stop_after: int | None = None
    says: str | None = None

    def prepare(self, prompt: str | Sequence[Message], sampling: SamplingSettings) -> PreparedRow:
        assert isinstance(prompt, str)
        if len(prompt) >= self.context_tokens:
            raise ContextError("too long", len(prompt), self.context_tokens)
        if prompt == "refused":
            raise UsageError("no template")
        return PreparedRow(tuple(map(ord, prompt)), sampling)

    def generate_rows(self, take: TakeRow) -> Iterator[RowEvent]:
        self._cancelled = False
        flying: dict[int, tuple[PreparedRow, int]] = {}
        taken = 0
        while True:
            used = sum(row.most_tokens(self.context_tokens) for row, _ in flying.values())
            while len(flying) < self.rows_at_once and (
                row := take(self.pool - used if flying else self.context_tokens)
            ):
                used += row.most_tokens(self.context_tokens)
                assert not flying or used <= self.pool
                flying[taken] = (row, 0)
                self.begun.append("".join(map(chr, row.ids)))
                taken += 1
            if not flying:
                return
            self.passes += 1
            if self.says:
                yield Notice(f"{self.says} {self.passes}")
            self.widest = max(self.widest, len(flying))
            if self._cancelled:
                for number, (row, new) in flying.items():
                    yield RowDone(number, "cancelled", "", len(row.ids), new)
                return
            for number, (row, new) in list(flying.items()):
                text = "".join(map(chr, row.ids))
                flying[number] = (row, new + 1)
                if new + 1 >= min(len(text), row.sampling.max_new_tokens):
                    del flying[number]
                    error = "disk" if text.startswith("bad") else None
                    self.new_tokens += new + 1
                    yield RowDone(number, "error" if error else "stop", text.upper(), len(row.ids), new + 1, error)
            yield RowsPass(len(flying), sum(new for _, new in flying.values()))


class Sink:
    def __init__(self, fail_at: int | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.fail_at = fail_at

    def write(self, line: bytes) -> None:
        if len(self.rows) == self.fail_at:
            raise RunLocalError("disk full")
        self.rows.append(json.loads(line))

    @property
    def ids(self) -> list[object]:
        return [row["id"] for row in self.rows]


def lines(*prompts: str) -> str:
    return "".join(json.dumps({"id": prompt, "prompt": prompt}) + "\n" for prompt in prompts)


def batch(text: str, engine: FakeRows | None = None, **options: Any) -> tuple[BatchSummary, Sink, FakeRows]:
    engine = engine or FakeRows()
    sink = options.pop("sink", None) or Sink()
    return run_batch(engine, io.BytesIO(text.encode()), sink, SAMPLING, 7, **options), sink, engine


def test_the_fake_is_a_row_engine() -> None:
    assert isinstance(FakeRows(), RowEngine)
    assert not isinstance(FakeEngine(), RowEngine)


def test_rows_are_written_as_they_end_and_the_longest_begin_first() -> None:
    text = lines("a", "bbbb", "cc", "dddddd", "e")
    _, sink, engine = batch(text, options=BatchOptions(lookahead=9))
    assert engine.begun == ["dddddd", "bbbb", "cc", "a", "e"]
    assert sorted(sink.ids, key=str) == ["a", "bbbb", "cc", "dddddd", "e"]
    assert sink.ids[0] == "cc"
    assert engine.widest == 3
    _, sink, engine = batch(text)  # a stream: what has come is begun
    assert engine.begun == ["a", "bbbb", "cc", "dddddd", "e"]


def test_what_an_engine_says_while_rows_run_is_passed_on() -> None:
    said: list[Notice] = []
    summary, sink, engine = batch(lines("aa", "bad"), FakeRows(says="hot"), on_notice=said.append)
    assert said == [Notice(f"hot {number}") for number in range(1, engine.passes + 1)]
    assert sorted(sink.ids, key=str) == ["aa", "bad"] and summary == batch(lines("aa", "bad"))[0]
    assert summary.mean_running == batch(lines("aa", "bad"))[0].mean_running, "a notice is no pass"

    class OneByOne(FakeEngine):
        def generate(self, prompt: str | Sequence[Message], sampling: SamplingSettings) -> Iterator[Event]:
            yield Notice("cold")
            yield from super().generate(prompt, sampling)

    said.clear()
    summary = run_batch(OneByOne(), [lines("a").encode()], Sink(), SAMPLING, 7, on_notice=said.append)
    assert said == [Notice("cold")] and summary.written == 1


def test_ordered() -> None:
    text = lines("aaaa", "b", "bad", "cc") + "{}\n" + lines("aaaa", "d")
    _, sink, engine = batch(text, options=BatchOptions(ordered=True, lookahead=9))
    assert sink.ids == ["aaaa", "b", "bad", "cc", "line-5", "aaaa", "d"]
    assert [row["error"] for row in sink.rows][4:6] == [
        "the row must have exactly one of 'prompt' and 'messages'",
        "an earlier row has the same id",
    ]
    assert engine.begun[:2] == ["aaaa", "b"]


def test_errors_stay_with_their_rows() -> None:
    text = lines("bad1", "good", "refused", "x" * 1000) + "nonsense\n"
    summary, sink, _ = batch(text)
    found = {row["id"]: (row["text"], row["error"], row["prompt_tokens"]) for row in sink.rows}
    assert found == {
        "bad1": ("BAD1", "disk", 4),
        "good": ("GOOD", None, 4),
        "refused": (None, "no template", None),
        "x" * 1000: (None, "too long", 1000),
        "line-5": (None, "not valid JSON: Expecting value at column 1", None),
    }
    assert (summary.written, summary.errors, summary.new_tokens, summary.failed) == (5, 4, 8, False)


def test_the_error_of_a_repeated_id_comes_after_the_row_it_repeats() -> None:
    text = lines("aaaa", "aaaa", "b", "aaaa")
    _, sink, _ = batch(text)
    assert sink.ids == ["b", "aaaa", "aaaa", "aaaa"]
    assert [row["error"] is None for row in sink.rows] == [True, True, False, False]
    # so that a run that was killed in between goes on with the right one
    _, again, _ = batch(text, done_before=Counter({'"b"': 1, '"aaaa"': 1}))
    assert [row["error"] for row in again.rows] == ["an earlier row has the same id"] * 2


def test_stop_finishes_what_is_in_flight_and_cancel_drops_it() -> None:
    text = lines(*(f"row{number}" for number in range(9)))
    engine = FakeRows()
    summary, sink, _ = batch(text, engine, should_stop=lambda: engine.passes > 1)
    assert (len(sink.rows), summary.interrupted) == (3, True)
    engine = FakeRows()
    summary, sink, _ = batch(text, engine, should_cancel=lambda: engine.passes > 5)
    assert (len(sink.rows), summary.interrupted) == (3, True)
    engine = FakeRows()
    summary, sink, _ = batch(lines("a", "b"), engine, should_stop=lambda: engine.passes > 0)
    assert (len(sink.rows), summary.interrupted) == (2, False), "there was no other row"


def test_too_many_errors_end_the_batch() -> None:
    text = lines("good", "bad1", "bad2", *(f"row{number}" for number in range(9)))
    summary, sink, _ = batch(text, options=BatchOptions(max_errors=2))
    assert len(sink.rows) == 3
    assert (summary.gave_up, summary.failed, summary.interrupted) == (True, True, False)


def test_what_does_not_fit_waits_and_all_come_through() -> None:
    engine = FakeRows(pool=40, context_tokens=40)
    text = lines("x" * 30, "y" * 30, "z", "w" * 30, "v")
    _, sink, _ = batch(text, engine, options=BatchOptions(lookahead=9))
    assert sorted(map(str, sink.ids)) == sorted(["x" * 30, "y" * 30, "z", "w" * 30, "v"])
    _, sink, _ = batch(text, FakeRows(pool=40, context_tokens=40), options=BatchOptions(ordered=True))
    assert sink.ids == ["x" * 30, "y" * 30, "z", "w" * 30, "v"]


def test_no_rows_and_one_row() -> None:
    assert batch("\n\n")[0] == BatchSummary(0, 0, 0, 0, False)
    assert batch(lines("a"))[1].ids == ["a"]


def test_progress_tells_of_rows_in_flight() -> None:
    seen: list[BatchProgress] = []
    ticks = iter(range(10_000))
    text = lines(*(f"row{number}" for number in range(6)))
    summary, _, _ = batch(text, on_progress=seen.append, rows_total=6, clock=lambda: next(ticks))
    assert max(progress.running for progress in seen) == 3
    assert max(progress.row_tokens for progress in seen) == 9
    assert seen[-1].rows_done == 6
    assert any(progress.eta_s for progress in seen)
    assert (summary.rows_at_once, summary.prompt_tokens) == (3, 24)
    assert summary.mean_running is not None and 2 < summary.mean_running <= 3


def test_a_full_disk_ends_the_run() -> None:
    with pytest.raises(RunLocalError, match="disk full"):
        batch(lines("a", "b", "c"), sink=Sink(fail_at=1))


@pytest.mark.parametrize("ordered", [False, True])
def test_a_thousand_rows_with_kills_in_between_come_out_once_each(ordered: bool, tmp_path: Path) -> None:
    chance = random.Random(5)
    prompts = [("bad" if number % 50 == 7 else "r") + f"{number:04}" + "x" * (number % 7) for number in range(1000)]
    text = lines(*prompts)
    written: list[dict[str, Any]] = []
    while len(written) < 1000:
        done = Counter(json.dumps(row["id"]) for row in written)
        sink = Sink(fail_at=chance.randrange(50, 400))  # a kill: rows in flight are lost, rows written are not
        with contextlib.suppress(RunLocalError):
            batch(text, sink=sink, done_before=done, options=BatchOptions(ordered, lookahead=256))
        written += sink.rows
    assert Counter(row["id"] for row in written) == Counter(prompts)
    assert [row for row in written if row["text"] != row["id"].upper()] == []
    assert sum(row["error"] is not None for row in written) == 20
    if ordered:
        assert [row["id"] for row in written] == prompts
