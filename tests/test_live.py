"""What can be watched of a running engine: snapshots that agree with its counters, and recordings of a part."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from multiprocessing import resource_tracker
from pathlib import Path
from types import SimpleNamespace

import pytest

from cache.trace import load_trace
from offload.config import DEFAULT_POLICY, SamplingSettings
from offload.engine import Engine
from offload.errors import RunLocalError, UsageError
from offload.events import CacheSnapshot, Done, ExpertState, LiveChanges, LoadProgress, Token
from tests.engines import GREEDY, finish, open_tiny
from tests.tiny_models import build_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("qwen2_moe", tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs")


@pytest.fixture
def engine(checkpoint: Path, packs: Path) -> Iterator[Engine]:
    with open_tiny(checkpoint, packs, residency=0.5) as opened:
        yield opened


def counts(snapshot: CacheSnapshot) -> tuple[int, int]:
    return sum(map(sum, snapshot.hits)), sum(map(sum, snapshot.misses))


def test_before_the_first_question_nothing_is_measured(engine: Engine) -> None:
    snapshot = engine.snapshot()
    assert counts(snapshot) == (0, 0)
    assert snapshot.recent == ()
    assert snapshot.stats.decode_tokens_per_s is None and snapshot.stats.experts.hit_rate is None
    assert snapshot.vram_bytes is None and snapshot.rss_bytes > 0
    assert all(set(row) == {ExpertState.ABSENT} for row in snapshot.states)


def test_a_snapshot_in_the_middle_and_at_the_end_agrees_with_the_counters(engine: Engine) -> None:
    middle = None
    for event in engine.generate("Once upon a time", GREEDY):
        if isinstance(event, Token) and middle is None:
            middle = engine.snapshot()
        last = event
    assert isinstance(last, Done) and middle is not None
    assert middle.stats.new_tokens == 1
    assert counts(middle) == (middle.stats.experts.hits, middle.stats.experts.misses)
    end = engine.snapshot()
    assert end.stats.to_json() | {"memory": None} == engine.stats().to_json() | {"memory": None}
    assert counts(end) == (end.stats.experts.hits, end.stats.experts.misses)
    assert len(end.recent) == last.new_tokens - 1  # the first token comes out of the prefill
    decoded = sum(token.hits + token.pending + token.misses for token in end.recent)
    assert sum(token.hits for token in end.recent) / decoded == end.stats.experts.decode_hit_rate
    assert sum(token.disk_bytes for token in end.recent) / len(end.recent) == end.stats.bytes.per_decode_token
    ready = sum(row.count(ExpertState.READY) for row in end.states)
    assert ready == end.tiers[0].used <= end.tiers[0].slots == engine.plan.slots
    assert max(map(max, end.last_use)) == end.forward


def test_snapshots_from_another_thread_never_fail_and_never_run_backwards(engine: Engine) -> None:
    seen: list[tuple[int, int, int]] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def watch() -> None:
        try:
            while not ended.is_set():
                stats = engine.snapshot().stats
                seen.append((stats.new_tokens, stats.experts.accesses, stats.bytes.disk_read))
        except BaseException as error:
            errors.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        finish(engine.generate("Once upon a time", SamplingSettings(temperature=0, max_new_tokens=20)))
    ended.set()
    watcher.join()
    assert not errors and len(seen) > 3
    assert all(b >= a for one, two in pairwise(seen) for a, b in zip(one, two, strict=True))


def test_a_part_of_a_session_is_recorded(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "part.npz"
    with pytest.raises(UsageError, match="nothing is being recorded"):
        engine.stop_trace(path)
    finish(engine.generate("Once upon a time", GREEDY))
    engine.start_trace()
    with pytest.raises(UsageError, match="already"):
        engine.start_trace()
    _, done = finish(engine.generate("Another question", GREEDY))
    with pytest.raises(RunLocalError, match="cannot be written"):
        engine.stop_trace(tmp_path / "no" / "folder.npz")
    rows = engine.stop_trace(path)
    finish(engine.generate("A third one", GREEDY))
    trace = load_trace(path)
    assert len(trace.ids) == rows
    assert set(trace.request) == {1}
    assert len(set(trace.step)) == done.prompt_tokens + done.new_tokens - 1


def test_trace_out_is_not_ended_by_a_recording(checkpoint: Path, packs: Path, tmp_path: Path) -> None:
    with open_tiny(checkpoint, packs, trace_out=tmp_path / "all.npz") as engine:
        with pytest.raises(UsageError, match="already"):
            engine.start_trace()
        with pytest.raises(UsageError, match="--trace-out"):
            engine.stop_trace(tmp_path / "part.npz")
        finish(engine.generate("Once upon a time", GREEDY))
    assert len(load_trace(tmp_path / "all.npz").ids)


def test_what_was_recorded_is_tuned_beside_the_engine(engine: Engine) -> None:
    with pytest.raises(UsageError, match="nothing is being recorded"):
        engine.tune_job()
    engine.start_trace()
    with pytest.raises(UsageError, match="ask something first"):
        engine.tune_job()
    for question in ("Once upon a time", "Another question", "And a third"):
        finish(engine.generate(question, GREEDY))
    job = engine.tune_job()
    finish(engine.generate("More that comes too late", GREEDY))

    steps: list[LoadProgress] = []
    report = job(steps.append)
    assert steps[0].done == 0 and steps[-1].done == steps[-1].total == len(steps) - 1
    assert report.found["requests"] == 3 and report.found["slots"] == engine.plan.slots
    advice = report.found["advice"][0]
    assert advice["default"]["policy"] == DEFAULT_POLICY
    assert not any(row["learn"] for row in report.found["results"]), "nothing that a running engine cannot change to"
    assert dict(report.flags)["--policy"] == advice["policy"]
    assert (report.changes == LiveChanges()) == advice["is_default"]
    engine.change(report.changes)
    assert engine.snapshot().current.policy == advice["policy"]

    def give_up(event: LoadProgress) -> None:
        if event.done:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        job(give_up)
    assert not multiprocessing.active_children()


def test_the_replays_start_below_a_full_screen_program(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has put a stream without a descriptor in the place of stderr, which multiprocessing would hand on."""
    finish((engine.start_trace(), engine.generate("Once upon a time", GREEDY))[1])
    seen: list[int] = []
    ensure = resource_tracker.ensure_running
    monkeypatch.setattr(resource_tracker, "ensure_running", lambda: (seen.append(sys.stderr.fileno()), ensure()))
    monkeypatch.setattr("sys.stderr", SimpleNamespace(fileno=lambda: -1, flush=lambda: None, write=len))
    assert engine.tune_job()(lambda event: None).notes
    assert seen[0] >= 0


def test_scores_are_those_of_the_policy(engine: Engine) -> None:
    assert engine.expert_score(99, 0) is None
    finish(engine.generate("Once upon a time", GREEDY))
    snapshot = engine.snapshot()
    used = next(expert for expert, last in enumerate(snapshot.last_use[0]) if last == snapshot.forward)
    score = engine.expert_score(snapshot.layers[0], used)
    assert score is not None and score > 0
    engine.change(LiveChanges(policy="lru"))
    assert engine.expert_score(snapshot.layers[0], used) is None


def test_the_names_that_can_be_chosen(engine: Engine) -> None:
    assert {"lru", "lfu", "ewma"} <= set(engine.choices["policy"])
    assert "off" in engine.choices["prefetch"]


def test_a_policy_is_changed_between_tokens_and_residents_stay(engine: Engine) -> None:
    stream = engine.generate("Once upon a time", SamplingSettings(temperature=0, max_new_tokens=12))
    before, after = None, None
    for number, event in enumerate(stream):
        if number == 6:
            assert isinstance(event, Token)
            before = engine.snapshot()
            engine.change(LiveChanges(policy="lfu"))
            after = engine.snapshot()
            engine._runtime.cache.check_integrity()
    assert before is not None and after is not None
    assert before.states == after.states
    assert (before.current.policy, after.current.policy, after.stats.policy) == (DEFAULT_POLICY, "lfu", "lfu")
    engine._runtime.cache.check_integrity()


def test_a_change_does_not_change_the_tokens(checkpoint: Path, packs: Path) -> None:
    sampling = SamplingSettings(temperature=0, max_new_tokens=12)
    texts = []
    for changes in (None, LiveChanges(policy="lru"), LiveChanges(prefetch="next-gate")):
        with open_tiny(checkpoint, packs, residency=0.3) as engine:
            text = ""
            for number, event in enumerate(engine.generate("Once upon a time", sampling)):
                if number == 5 and changes is not None:
                    engine.change(changes)
                text = event.text if isinstance(event, Done) else text
            texts.append(text)
    assert texts[0] == texts[1] == texts[2]


def test_what_cannot_be_changed_is_said_and_changes_nothing(engine: Engine) -> None:
    for changes, problem in (
        (LiveChanges(policy="nope"), "unknown policy 'nope'; there are"),
        (LiveChanges(policy="lru", prefetch="nope"), "'nope'"),
        (LiveChanges(policy="lru", ram=1), "--ram 1 B is too small"),
    ):
        with pytest.raises(UsageError, match=problem):
            engine.change(changes)
        assert engine.snapshot().current.policy == DEFAULT_POLICY
