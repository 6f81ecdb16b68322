"""Prompts read the next layer's records before its router: the same tokens, counted, and safe against breaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache.expert_cache import SlotState
from cache.keys import ExpertKey
from cache.outcomes import Reservation
from cache.read_ahead import ReadAhead
from offload.checkpoint.expert_file import ExpertFile
from offload.config import SamplingSettings
from offload.engine import Engine
from offload.errors import ExpertFileError
from offload.events import Done, PrefillProgress, RunStats
from offload.memory.lanes import Ticket
from tests.engines import finish, open_tiny
from tests.tiny_models import build_tiny

SHORT = SamplingSettings(temperature=0, max_new_tokens=4)
LONG = "one two three four five six seven eight nine ten " * 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("qwen3_moe", tmp_path_factory.mktemp("ahead") / "model")


def answer(engine: Engine) -> tuple[str, RunStats]:
    _, done = finish(engine.generate(LONG, SHORT))
    assert done.error is None
    at_rest(engine)
    engine.reset()
    return done.text, done.stats


def at_rest(engine: Engine) -> None:
    """Only what is read ahead may be loading between two answers."""
    runtime = engine._runtime
    runtime.cache.check_integrity()
    loading = {key for key, state in runtime.cache.occupancy() if state is SlotState.LOADING}
    assert loading == set(runtime._coming) == set(runtime._reading.coming)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_the_same_tokens_and_what_is_counted(checkpoint: Path, tmp_path: Path, device: str) -> None:
    texts = set()
    for scope in ("global", "layer"):
        for residency in (0.01, 0.5, 1.0):
            settings = {"device": device, "scope": scope, "residency": residency, "miss": "fetch"}
            with open_tiny(checkpoint, tmp_path, prefill_chunk=41, **settings) as engine:
                text, stats = answer(engine)
                texts.add(text)
                assert 0 <= stats.experts.read_ahead_used <= stats.experts.read_ahead
                assert stats.experts.read_ahead_used <= stats.experts.pending
                assert stats.experts.prefetched == 0
                if scope == "global" or residency == 1:  # by layer only free slots are taken
                    assert stats.experts.read_ahead_used > 0
                if residency == 1 and device == "cpu":
                    for_nothing = stats.experts.read_ahead - stats.experts.read_ahead_used
                    size = engine.plan.sizes.slot_bytes
                    assert stats.bytes.disk_read == stats.bytes.needed + for_nothing * size
    assert len(texts) == 1


def test_a_prompt_that_is_broken_off_leaves_nothing_behind(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.read_ahead.FULL", 0.5)  # a random router leaves some out
    with open_tiny(checkpoint, tmp_path, residency=0.3, prefill_chunk=40) as engine:
        expected = answer(engine)[0]
        for chunks in range(3):
            for event in engine.generate(LONG, SHORT):
                if isinstance(event, PrefillProgress) and event.done >= 40 * chunks:
                    engine.cancel()
                assert not isinstance(event, Done) or event.reason == "cancelled"
            at_rest(engine)
            assert chunks != 1 or engine._runtime._coming, "the next chunk's first layer was under way"
            assert answer(engine)[0] == expected
        engine._runtime.settle()
        at_rest(engine)
        assert not engine._runtime._coming


def test_a_record_that_cannot_be_read_ahead_is_an_error_where_it_is_needed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_tiny(checkpoint, tmp_path, residency=0.3, prefill_chunk=40) as engine:
        expected = answer(engine)[0]
        real, reserve = ExpertFile.read_into, ReadAhead.reserve
        ahead: set[ExpertKey] = set()

        def noted(self: ReadAhead) -> list[Reservation]:
            loads = reserve(self)
            ahead.update(load.key for load in loads)
            return loads

        def failing(self: ExpertFile, key: ExpertKey, buffer: memoryview) -> int:
            if key in ahead:
                raise ExpertFileError(f"expert {key.expert} cannot be read")
            return real(self, key, buffer)

        monkeypatch.setattr(ReadAhead, "reserve", noted)
        monkeypatch.setattr(ExpertFile, "read_into", failing)
        _, done = finish(engine.generate(LONG, SHORT))
        assert ahead
        assert done.reason == "error" and "cannot be read" in (done.error or "")
        at_rest(engine)
        monkeypatch.setattr(ExpertFile, "read_into", real)
        assert answer(engine)[0] == expected


def test_hits_fill_the_gaps_between_reads(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has arrived is computed first, so that its slot reads on; the same tokens and counts whenever that is."""
    answers, hits_last = [], []
    for ready in (lambda ticket: ticket._done.wait(), lambda ticket: False):
        monkeypatch.setattr(Ticket, "ready", ready)
        with open_tiny(checkpoint, tmp_path, residency=0.6, prefill_chunk=41) as engine:
            runtime, computed, found = engine._runtime, [], []
            lookup, compute = runtime.cache.lookup, runtime._compute_ready
            monkeypatch.setattr(
                runtime.cache,
                "lookup",
                lambda *args, real=lookup, to=found, **named: to.append(real(*args, **named)) or to[-1],
            )
            monkeypatch.setattr(
                runtime, "_compute_ready", lambda *args, real=compute, to=computed: to.extend(args[1]) or real(*args)
            )
            answer(engine)
            prompt = len(found)
            text, stats = answer(engine)
            answers.append((text, stats.experts, stats.bytes.disk_read))
            first = found[prompt]
            assert first.hits and first.misses, "this says nothing else"
            order = [
                key for key in computed[sum(map(len, sum(found[:prompt], ()))) :] if key.layer == first.hits[0].layer
            ]
            hits_last.append(order[len(first.hits) + len(first.pending) + len(first.misses) - 1] in first.hits)
    assert answers[0] == answers[1]
    assert hits_last == [True, False]
