"""Rows that decode together read ahead what they are almost sure to take: same tokens, few reads, no luck in counts."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from cache.cache_log import load_log, replay_log
from offload.checkpoint.expert_file import ExpertFile
from offload.config import SamplingSettings
from offload.engine import Engine
from offload.events import RowDone, RunStats
from offload.model.prefetch import NextGate, RowGuesses
from tests.engines import open_tiny
from tests.tiny_models import build_tiny

SIZES = {"num_hidden_layers": 6, "num_experts": 48, "num_local_experts": 48, "num_experts_per_tok": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = SIZES | {"moe_intermediate_size": 16}
    return build_tiny("qwen3_moe", tmp_path_factory.mktemp("rows") / "model", sizes=sizes)


def answers(engine: Engine, rows: int = 6) -> list[str]:
    left = [
        engine.prepare("one two three"[:4 + number], SamplingSettings(temperature=1, seed=number, max_new_tokens=24))
        for number in range(rows)
    ]  # fmt: skip
    ends = [event for event in engine.generate_rows(lambda room: left.pop() if left else None)
            if isinstance(event, RowDone)]  # fmt: skip
    assert [end.error for end in ends] == [None] * rows
    engine._runtime.cache.check_integrity()
    return [end.text for end in sorted(ends, key=lambda end: end.row)]


def run(checkpoint: Path, packs: Path, **settings: Any) -> tuple[list[str], RunStats]:
    with open_tiny(checkpoint, packs, **({"residency": 0.15, "batch_rows": 6} | settings)) as engine:
        return answers(engine), engine.stats()


@pytest.fixture
def bold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random routers foretell little: more may be wrong."""
    monkeypatch.setattr("cache.guesses.MOST_WRONG", 1.0)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_the_tokens_are_those_without(
    checkpoint: Path, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"device": device, "miss": "fetch"}
    texts = {}
    for most in (0.0, 1.0):
        monkeypatch.setattr("cache.guesses.MOST_WRONG", most)
        texts[most], stats = run(checkpoint, tmp_path, **settings)
        assert (stats.experts.read_ahead > 0) == (most > 0)
        for_nothing = stats.experts.read_ahead - stats.experts.read_ahead_used
        assert for_nothing <= 1.5 * most * (stats.experts.misses + stats.experts.pending) + 4
        assert stats.experts.prefetched == 0
    assert texts[0.0] == texts[1.0]


def test_counts_do_not_depend_on_when_reads_end(
    checkpoint: Path, tmp_path: Path, bold: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, chance = ExpertFile.read_into, random.Random(1)
    seen = []
    for slowest in (0.0, 0.002):

        def late(self: ExpertFile, key: Any, buffer: Any, most: float = slowest) -> int:
            time.sleep(most * chance.random())
            return real(self, key, buffer)

        monkeypatch.setattr(ExpertFile, "read_into", late)
        texts, stats = run(checkpoint, tmp_path)
        experts = stats.experts
        seen.append((texts, experts.hits, experts.pending, experts.misses, experts.read_ahead, stats.bytes.disk_read))
        assert experts.read_ahead > 0
    assert seen[0] == seen[1]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_caches_log_repeats_the_run(checkpoint: Path, tmp_path: Path, scope: str, bold: None) -> None:
    log = tmp_path / "cache.log"
    _, stats = run(checkpoint, tmp_path, scope=scope, cache_log=log)
    counters = replay_log(load_log(log))
    assert counters.decode.hits + counters.prefill.hits == stats.experts.hits
    assert counters.decode.pending + counters.prefill.pending == stats.experts.pending
    assert counters.decode.misses + counters.prefill.misses == stats.experts.misses


def test_nobody_guesses_where_one_row_decodes_or_a_prefetch_does(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = RowGuesses.of

    def noted(self: RowGuesses, layer: int, hidden: Any, limit: int) -> list[list[int]]:
        asked.append(len(hidden))
        return real(self, layer, hidden, limit)

    monkeypatch.setattr(RowGuesses, "of", noted)
    with open_tiny(checkpoint, tmp_path, residency=0.15, batch_rows=6) as engine:
        answers(engine, 1)
        assert not asked
        answers(engine, 3)
        assert set(asked) <= {2, 3}
        asked.clear()
    run(checkpoint, tmp_path, prefetch="next-gate")
    assert not asked
    monkeypatch.setattr(NextGate, "rests", True)
    run(checkpoint, tmp_path, prefetch="next-gate")
    assert asked


def test_a_batch_that_is_broken_off_leaves_nothing_behind(
    checkpoint: Path, tmp_path: Path, bold: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancel in the middle, and answers afterwards as before."""
    with open_tiny(checkpoint, tmp_path, residency=0.15, batch_rows=6) as engine:
        expected = answers(engine)
        left = [engine.prepare("one two", SamplingSettings(temperature=1, seed=9, max_new_tokens=24))] * 4
        for number, event in enumerate(engine.generate_rows(lambda room: left.pop() if left else None)):
            if number == 8:
                engine.cancel()
            assert not isinstance(event, RowDone) or event.reason == "cancelled"
        assert set(engine._runtime._coming) == set(engine._runtime._reading.coming)
        assert answers(engine) == expected
