"""The sweep: folds by request, nothing scored on what it learned from, honest gains, and flags that can be given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache.policies import runtime_policies
from cache.simulate import ReplaySettings, replay
from cache.synthetic import SyntheticSettings, synthetic_trace
from cache.trace import Trace, load_trace
from cache.trace_edit import requests_of, select
from cache.tune import (
    Candidate,
    Laboratory,
    Row,
    TuneError,
    TuneResult,
    TuneSettings,
    candidates,
    default_specs,
    split_specs,
)

SHARED = Path(__file__).parents[2].parent / "shared" / "traces"
SMALL = SyntheticSettings(layers=3, experts=16, top_k=2, tokens=40, requests=6, prompt_tokens=4, overlap=0.5)
DEFAULT = Candidate("ewma", "layer")


def run(trace: Trace, specs: list[str], **settings: object) -> tuple[Laboratory, TuneResult]:
    asked = TuneSettings(candidates(specs, ["layer"], [None]), (12,), DEFAULT)
    laboratory = Laboratory.of(trace, replace(asked, **settings))  # type: ignore[arg-type]
    return laboratory, laboratory.summarise({task: laboratory.run(task) for task in laboratory.tasks()})


def test_folds_together_are_the_requests_replayed_by_themselves() -> None:
    trace = synthetic_trace(SMALL)
    laboratory, result = run(trace, ["lru"], folds=6, cold=True)
    row = next(row for row in result.rows if row.candidate.policy == "lru")
    whole = replay(trace, ReplaySettings(policy="lru", scope="layer", slots=12, fresh_per_request=True))
    assert (row.score.hits, row.score.misses) == (whole.total.hits.sum(), whole.total.misses.sum())
    assert [score.hits for score in row.by_fold] == [
        replay(select(trace, [request]), ReplaySettings(policy="lru", scope="layer", slots=12)).total.hits.sum()
        for request in requests_of(trace)
    ]
    assert [len(part) for part in laboratory.parts] == [1] * 6
    assert row.residency == 0.25 and row.spread == pytest.approx(np.std([s.hit_rate for s in row.by_fold], ddof=1))


def test_what_learns_is_never_scored_on_its_own_requests() -> None:
    """Each request has experts of its own: a static order learned from the others knows nothing about them."""
    n, requests = 64, 4
    ids = np.concatenate([np.tile(np.arange(4) + 4 * request, n // 4) for request in range(requests)])
    trace = Trace(
        np.repeat(np.arange(requests), n).astype(np.int32), np.ones(n * requests, np.uint8),
        np.tile(np.arange(n), requests).astype(np.int32), np.arange(n * requests, dtype=np.int32),
        np.zeros(n * requests, np.int16), ids[:, None].astype(np.int16), np.ones((n * requests, 1), np.float16),
        {"model": "own", "layers": 1, "experts": 16, "top_k": 1},
    )  # fmt: skip
    for folds in (2, 4):
        laboratory, result = run(trace, ["static", "lru"], folds=folds, slots=(4,))
        for part, training in zip(laboratory.parts, laboratory.training, strict=True):
            assert training is not None and not set(part) & set(training.request.tolist())
    rates = {row.candidate.policy: row.score.hit_rate for row in result.rows}
    assert rates["belady"] == pytest.approx(60 / 64)
    assert rates["static"] == rates["lru"], "learned from other requests it is no better than recency"
    one, _ = run(trace, ["static", "lru"], folds=4, slots=(4,))
    assert {candidate.policy for candidate in one.settings.candidates} == {"static", "lru"}


def test_one_request_cannot_be_learned_from() -> None:
    trace = synthetic_trace(replace(SMALL, requests=1))
    laboratory, result = run(trace, ["static", "lru"])
    assert "nothing learns beforehand here" in laboratory.skipped[0]
    assert [candidate.policy for candidate in laboratory.settings.candidates] == ["lru"]
    assert result.folds == 1 and not result.advice[0].validated
    assert result.rows[0].spread is None


def test_nothing_passes_belady_and_the_distance_is_in_points() -> None:
    _, result = run(synthetic_trace(SMALL), default_specs(), slots=(6, 12, 24))
    for row in result.rows:
        best = next(
            other for other in result.rows
            if other.candidate == Candidate("belady", row.candidate.scope) and other.slots == row.slots
        )  # fmt: skip
        assert row.below_belady == pytest.approx(best.score.hit_rate - row.score.hit_rate)
        assert row.below_belady >= -1e-9
        assert row.score.hits + row.score.pending + row.score.misses == best.score.accesses
    assert {row.candidate.policy.partition(":")[0] for row in result.rows} >= set(runtime_policies())
    json.dumps(result.to_json(), allow_nan=False)


def test_the_gain_is_that_of_choices_made_on_other_folds() -> None:
    _, result = run(synthetic_trace(SMALL), ["lru", "lfu", "random", "ewma:half_life=2"], folds=3)
    advice = result.advice[0]
    rows = [row for row in result.rows if row.candidate.policy != "belady"]
    default = next(row for row in rows if row.candidate == DEFAULT)
    for fold in range(3):
        others = [other for other in range(3) if other != fold]

        def rate(row: Row, others: list[int] = others) -> float:
            scores = [row.by_fold[other] for other in others]
            return sum(score.hits for score in scores) / sum(score.accesses for score in scores)

        best = max(rate(row) for row in rows)
        picked = [row.by_fold[fold].hit_rate for row in rows if rate(row) == best]
        assert advice.gains[fold] + default.by_fold[fold].hit_rate in [pytest.approx(value) for value in picked]
    assert advice.gain == pytest.approx(np.mean(advice.gains))
    assert advice.best is (advice.first if advice.gain > 0 else default)


def test_no_change_without_a_reason() -> None:
    _, result = run(synthetic_trace(SMALL), ["random"], folds=3)
    assert result.advice[0].best.candidate == DEFAULT


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("lru", ["lru"]),
        ("lru, lfu", ["lru", "lfu"]),
        ("ewma:half_life=4|16,lfu", ["ewma:half_life=4", "ewma:half_life=16", "lfu"]),
        ("slru:a=1|2,b=3|4", ["slru:a=1,b=3", "slru:a=1,b=4", "slru:a=2,b=3", "slru:a=2,b=4"]),
        ("static:a|b.npz", ["static:a|b.npz"]),
    ],
)
def test_lists_of_policies(text: str, specs: list[str]) -> None:
    assert split_specs(text) == specs


def test_what_makes_no_sense() -> None:
    for policies, scopes, reason in (
        (["lru"], ["all"], "there is no scope 'all'; there are"),
        (["best"], ["layer"], "there is no policy 'best'; there are"),
        (["belady"], ["layer"], "always shown for comparison"),
    ):
        with pytest.raises(TuneError, match=reason):
            candidates(policies, scopes, [None])
    with pytest.raises(TuneError, match="names no policy"):
        split_specs(" , ")
    trace = synthetic_trace(SMALL)
    with pytest.raises(TuneError, match="no parameter 'depth'"):
        run(trace, ["ewma:depth=3"])
    with pytest.raises(TuneError, match="the trace is empty"):
        run(select(trace, []), ["lru"])
    with pytest.raises(TuneError, match="--folds"):
        run(trace, ["lru"], folds=0)


def test_the_published_table_on_recorded_requests() -> None:
    """DESIGN's reference: capacity by layer, cold start per request; here of the first two requests of the trace."""
    path = SHARED / "qwen-route.npz"
    if not path.exists():
        pytest.skip("the recorded traces are not on this machine")
    _, result = run(load_trace(path), ["lru", "lfu", "ewma"], slots=(768, 1536), cold=True)
    found = {
        (row.candidate.policy, row.slots): 100 * row.score.hit_rate for row in result.rows
    }  # fmt: skip
    for (policy, slots), rate in {
        ("lru", 768): 59.5, ("ewma", 768): 61.37, ("belady", 768): 73.16, ("ewma", 1536): 79.31, ("belady", 1536): 86.8,
    }.items():  # fmt: skip
        assert found[policy, slots] == pytest.approx(rate, abs=0.3)
