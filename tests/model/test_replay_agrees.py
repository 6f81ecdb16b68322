"""What a run counts is what a replay counts: of its trace without prefetches, of its cache's log with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache.cache_log import CacheLogError, load_log, main, replay_log
from cache.events import trace_events
from cache.policies import runtime_policies
from cache.simulate import ReplaySettings, replay_events
from cache.trace import DECODE, PREFILL, load_trace
from offload.config import SamplingSettings
from offload.engine import Engine
from offload.errors import UsageError
from offload.events import LiveChanges, RowDone, RunStats
from offload.protocol import PreparedRow
from tests.engines import finish, open_tiny
from tests.tiny_models import build_tiny

VARIED = SamplingSettings(temperature=1.5, max_new_tokens=24, seed=3)
PROMPTS = ("one two three four five six seven eight nine ten", "ten nine")  # the first needs waves
LONG = "one two three four five six seven eight nine ten " * 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("qwen3_moe", tmp_path_factory.mktemp("replay") / "model")


def answer(engine: Engine) -> tuple[list[str], RunStats]:
    texts = []
    for prompt in PROMPTS:
        _, done = finish(engine.generate(prompt, VARIED))
        assert done.error is None
        texts.append(done.text)
    engine._runtime.cache.check_integrity()
    return texts, engine.stats()


@pytest.mark.parametrize("residency", [0.01, 0.2, 0.6])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_statistics_are_those_of_a_replay(checkpoint: Path, tmp_path: Path, scope: str, residency: float) -> None:
    """Every policy; one slot in all, and events that take several waves, included."""
    policies = ["lru", "foresight"]
    if (scope, residency) == ("layer", 0.2):
        policies = [name for name in runtime_policies() if name != "static"]
    for policy in policies:
        trace = tmp_path / f"{policy}.npz"
        settings = {"policy": policy, "scope": scope, "residency": residency, "trace_out": trace, "seed": 7}
        with open_tiny(checkpoint, tmp_path / "packs", prefill_chunk=4, **settings) as engine:
            stats = answer(engine)[1]
            evictions = engine._runtime.cache.counters.evictions
        events = trace_events(load_trace(trace))
        replayed = replay_events(events, ReplaySettings(policy, stats.memory.expert_slots, scope, seed=7))
        total = replayed.total
        assert (int(total.hits.sum()), int(total.misses.sum())) == (stats.experts.hits, stats.experts.misses), policy
        assert int(total.evictions.sum()) == evictions
        assert stats.experts.hits > 0 or residency < 0.1 or policy == "lru"
        assert stats.scope == scope
        if residency < 0.1 or (scope, residency) == ("layer", 0.2):
            room = stats.memory.expert_slots // (len(events.layers()) if scope == "layer" else 1)
            assert np.diff(events.starts).max() > room, "some events took waves"


def agree(stats: RunStats, evictions: int, trace: Path) -> None:
    """The replay of ``trace`` counts what the run counted."""
    settings = ReplaySettings(stats.policy, stats.memory.expert_slots, stats.scope, seed=7)
    total = replay_events(trace_events(load_trace(trace)), settings).total
    assert (int(total.hits.sum()), int(total.misses.sum())) == (stats.experts.hits, stats.experts.misses)
    assert int(total.evictions.sum()) == evictions


@pytest.mark.parametrize(
    ("policy", "scope", "residency"),
    [("lru", "global", 0.4), ("foresight", "global", 0.1), ("foresight", "layer", 0.4)],
)
def test_prompts_of_several_chunks_agree(
    checkpoint: Path, tmp_path: Path, policy: str, scope: str, residency: float
) -> None:
    """One that goes on from the KV cache, answers of one token, which decode nothing, and scored texts included."""
    trace = tmp_path / "trace.npz"
    settings = {"policy": policy, "scope": scope, "residency": residency, "trace_out": trace, "seed": 7}
    with open_tiny(checkpoint, tmp_path / "packs", prefill_chunk=12, **settings) as engine:
        ids = engine.encode(LONG)
        assert len(ids) > 24
        for prompt, new in ((ids[:30], 1), (ids[:70], 8), ([*ids[:70], *ids[:14]], 1), (ids[:25], 4)):
            done = finish(engine.generate_ids(prompt, SamplingSettings(temperature=0, max_new_tokens=new)))[1]
            assert done.error is None
        for _ in engine.score(ids[:31]):
            pass
        stats, evictions = engine.stats(), engine._runtime.cache.counters.evictions
    assert evictions > 0
    agree(stats, evictions, trace)


@pytest.mark.parametrize(
    ("policy", "scope", "residency"),
    [("lru", "global", 0.4), ("foresight", "global", 0.4), ("lru", "global", 0.1), ("ewma", "layer", 0.4)],
)
def test_rows_that_share_passes_agree(
    checkpoint: Path, tmp_path: Path, policy: str, scope: str, residency: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes in which some rows decode and others read their prompts, and those of the last row alone.

    But for what rows read ahead: a trace has no guesses (tests/model/test_rows_ahead.py has the log of such a run).
    """
    monkeypatch.setattr("cache.guesses.MOST_WRONG", 0.0)
    trace = tmp_path / "trace.npz"
    settings = {
        "policy": policy,
        "scope": scope,
        "residency": residency,
        "trace_out": trace,
        "seed": 7,
        "batch_rows": 3,
    }
    with open_tiny(checkpoint, tmp_path / "packs", prefill_chunk=16, **settings) as engine:
        rows = iter(
            engine.prepare(LONG[: 20 + 23 * (number % 4)], SamplingSettings(temperature=0, max_new_tokens=new))
            for number, new in enumerate((4, 9, 1, 7, 3, 12))
        )

        def take(room: int) -> PreparedRow | None:
            return next(rows, None)

        ends = [event for event in engine.generate_rows(take) if isinstance(event, RowDone)]
        assert [end.error for end in ends] == [None] * 6
        stats, evictions = engine.stats(), engine._runtime.cache.counters.evictions
    loaded = load_trace(trace)
    mixed = {int(forward) for forward in loaded.forward[loaded.phase == DECODE]}
    assert mixed & {int(forward) for forward in loaded.forward[loaded.phase == PREFILL]}
    agree(stats, evictions, trace)


@pytest.mark.parametrize("prefetch", ["next-gate", "layer-markov", "previous-token", "popularity"])
def test_with_prefetches_the_log_repeats_the_run(checkpoint: Path, tmp_path: Path, prefetch: str) -> None:
    with open_tiny(checkpoint, tmp_path / "packs", residency=0.5) as engine:
        expected = answer(engine)[0]
    log = tmp_path / "cache.log"
    for scope in ("layer", "global"):
        with open_tiny(
            checkpoint, tmp_path / "packs", residency=0.5, prefetch=prefetch, scope=scope, cache_log=log
        ) as engine:
            texts, stats = answer(engine)
        assert texts == expected
        assert stats.experts.prefetched > 0
        counters = replay_log(load_log(log))
        assert counters.decode.hits + counters.prefill.hits == stats.experts.hits
        assert counters.decode.pending + counters.prefill.pending == stats.experts.pending
        assert counters.decode.misses + counters.prefill.misses == stats.experts.misses


def test_a_log_that_differs_is_noticed(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "cache.log"
    with open_tiny(checkpoint, tmp_path / "packs", residency=0.3, policy="lru", cache_log=log) as engine:
        answer(engine)
        engine.change(LiveChanges(policy="lfu", scope="layer"))
        answer(engine)
    assert main([str(log)]) == 0
    assert "the same" in capsys.readouterr().out
    text = log.read_text()
    (tmp_path / "other.log").write_text(text.replace('"policy": "lru"', '"policy": "random"', 1))
    (tmp_path / "torn.log").write_text(text[: len(text) // 2].rpartition("\n")[0])
    (tmp_path / "none.log").write_text("{}\n")
    for name, reason in (("other", "answered"), ("torn", "no end"), ("none", "not a cache log")):
        with pytest.raises(CacheLogError, match=reason):
            replay_log(load_log(tmp_path / f"{name}.log"))
        assert main([str(tmp_path / f"{name}.log")]) == 1
    assert main([]) == 2


def test_changes_keep_residents_and_tokens(checkpoint: Path, tmp_path: Path) -> None:
    with open_tiny(checkpoint, tmp_path / "packs", residency=0.5) as engine:
        expected = answer(engine)[0]
    with open_tiny(checkpoint, tmp_path / "packs", residency=0.5) as engine:
        changes = iter(
            [
                LiveChanges(policy="lru"),
                LiveChanges(scope="layer"),
                LiveChanges(prefetch="layer-markov"),
                LiveChanges(policy="arc", scope="global", prefetch="next-gate"),
                LiveChanges(policy="sieve", scope="layer", prefetch="off"),
            ]
        )
        texts = []
        for prompt in PROMPTS:
            text = ""
            for event in engine.generate(prompt, VARIED):
                text = getattr(event, "text", text)
                change = next(changes, None)
                if change is not None:
                    before = engine._runtime.cache.resident()
                    engine.change(change)
                    assert engine._runtime.cache.resident() == before
                    engine._runtime.cache.check_integrity()
            texts.append(text)
        assert next(changes, None) is None
        assert texts == expected
        stats = engine.stats()
        assert (stats.policy, stats.scope, stats.prefetch) == ("sieve", "layer", "off")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (LiveChanges(policy="mru"), ["mru", "foresight", "lru"]),
        (LiveChanges(policy="belady"), ["belady", "future"]),
        (LiveChanges(scope="model"), ["--scope", "layer", "global"]),
        (LiveChanges(prefetch="tarot"), ["--prefetch", "next-gate", "popularity"]),
        (LiveChanges(policy="lru", ram=5), ["--ram", "the smallest that works"]),
        (LiveChanges(policy="lru", residency=2.0), ["residency", "at most 1"]),
    ],
)
def test_changes_that_make_no_sense(checkpoint: Path, tmp_path: Path, change: LiveChanges, words: list[str]) -> None:
    with open_tiny(checkpoint, tmp_path / "packs", residency=0.5) as engine:
        with pytest.raises(UsageError) as caught:
            engine.change(change)
        assert all(word in str(caught.value) for word in words)
        assert engine.stats().policy == "foresight"
        answer(engine)
