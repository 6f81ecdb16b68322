"""Statistics of traces: by hand on tiny ones, against the published figures on made and on recorded ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache.synthetic import MODELS, SyntheticError, SyntheticSettings, synthetic_trace
from cache.trace import DECODE, PREFILL, Trace, TraceRecorder, load_trace, save_trace
from cache.trace_edit import folds, merge, requests_of, select
from cache.trace_statistics import trace_statistics

SHARED = Path(__file__).parents[2].parent / "shared" / "traces"


def trace_of(rows: list[tuple[int, int, int, list[int]]], experts: int = 8, phase: int = DECODE) -> Trace:
    """Rows (request, step, layer, ids), the first choice first, each a pass of its own."""
    columns = np.array([row[:3] for row in rows]).reshape(-1, 3)
    ids = np.array([row[3] for row in rows], np.int16)
    n = len(rows)
    weights = np.tile(np.linspace(0.9, 0.1, ids.shape[1]), (n, 1)).astype(np.float16)
    return Trace(
        columns[:, 0].astype(np.int32), np.full(n, phase, np.uint8), columns[:, 1].astype(np.int32),
        np.arange(n, dtype=np.int32), columns[:, 2].astype(np.int16), ids, weights,
        {"model": "hand", "layers": len(set(columns[:, 2].tolist())), "experts": experts, "top_k": ids.shape[1]},
    )  # fmt: skip


def test_by_hand() -> None:
    sets = [[0, 1], [0, 2], [2, 0], [5, 6]]
    found = trace_statistics(trace_of([(0, step, 3, ids) for step, ids in enumerate(sets)]))
    layer, one = found.by_layer[0]
    assert layer == 3
    assert one.overlap == pytest.approx((1 + 2 + 0) / 6)
    assert one.first_repeated == pytest.approx(1 / 3)
    assert one.any_shared == pytest.approx(2 / 3)
    assert one.distinct == pytest.approx(5 / 8)
    assert dict(found.lags) == {1: pytest.approx(3 / 6), 2: pytest.approx(1 / 4)}
    assert dict(found.working_set) == {1: 2.0, 2: pytest.approx((3 + 2 + 4) / 3), 4: 5.0}
    assert (found.requests, found.decode_tokens, found.prefill_tokens, found.events) == (1, 4, 0, 4)
    assert found.uniform_overlap == 0.25
    json.dumps(found.to_json(), allow_nan=False)


def test_requests_layers_and_gaps_are_kept_apart() -> None:
    rows = [(0, 0, 0, [1, 2]), (0, 0, 1, [3, 4]), (1, 1, 0, [1, 2]), (1, 1, 1, [3, 4]), (1, 3, 0, [1, 2])]
    found = trace_statistics(trace_of(rows))
    assert [one.overlap for _, one in found.by_layer] == [None, None], "no two are consecutive tokens of a request"
    assert dict(found.lags) == {2: 1.0}


def test_uneven_use() -> None:
    even = trace_statistics(trace_of([(0, step, 0, [step % 8]) for step in range(80)])).mean
    one = trace_statistics(trace_of([(0, step, 0, [3]) for step in range(80)])).mean
    assert (even.gini, even.entropy, even.top_25) == (pytest.approx(0), pytest.approx(1), pytest.approx(0.25))
    assert (one.gini, one.entropy, one.top_10) == (pytest.approx(7 / 8), pytest.approx(0), 1.0)


def test_entropy_within_requests_is_less_than_that_of_all() -> None:
    rows = [(request, step, 0, [request]) for request in range(8) for step in range(4)]
    found = trace_statistics(trace_of(rows)).mean
    assert (found.entropy, found.entropy_in_request) == (pytest.approx(1), pytest.approx(0))


def test_no_expert_is_no_use_and_prompts_count_where_there_is_nothing_else() -> None:
    found = trace_statistics(trace_of([(0, step, 0, [1, 8]) for step in range(4)], phase=PREFILL))
    assert (found.measured, found.mean.overlap, found.mean.top_10) == ("prefill", 1.0, 1.0)


def test_a_batch_is_measured_request_by_request(tmp_path: Path) -> None:
    recorder = TraceRecorder("tiny", 1, 8, 1, tmp_path)
    for step in range(5):
        recorder.record(
            request=np.array([0, 1]), phase=np.array([1, 1]), step=np.array([step, 70 + step]), forward=step, layer=0,
            ids=np.array([[1], [step]]), weights=np.ones((2, 1)),
        )  # fmt: skip
    recorder.save(tmp_path / "t.npz")
    found = trace_statistics(load_trace(tmp_path / "t.npz"))
    assert (found.passes, found.events, found.largest_event, found.decode_tokens) == (5, 5, 2, 10)
    assert found.mean.overlap == pytest.approx(0.5)


def test_an_empty_trace(tmp_path: Path) -> None:
    TraceRecorder("tiny", 2, 8, 2).save(tmp_path / "t.npz")
    found = trace_statistics(load_trace(tmp_path / "t.npz"))
    assert (found.events, found.mean.overlap, found.lags) == (0, None, ())


def test_one_layer_foretells_the_next() -> None:
    settings = SyntheticSettings(layers=4, experts=16, top_k=2, tokens=600, requests=2, topic=0.0, skew=0.0)
    by_chance = trace_statistics(synthetic_trace(replace(settings, coupling=0.0))).mean.foretold
    coupled = trace_statistics(synthetic_trace(replace(settings, coupling=1.0))).mean.foretold
    assert by_chance is not None and coupled is not None
    assert by_chance == pytest.approx(2 / 16, abs=0.03) and coupled > 0.9


def test_mixtral_as_published() -> None:
    """Table 5 of arXiv 2401.04088, means over its texts: the first choice is repeated, at least one is shared."""
    settings = replace(MODELS["mixtral-8x7b"], tokens=500, requests=16)
    layers = dict(trace_statistics(synthetic_trace(settings)).by_layer)
    for layer, first, shared in ((0, 0.14, 0.48), (15, 0.26, 0.635), (31, 0.23, 0.53)):
        assert layers[layer].first_repeated == pytest.approx(first, abs=0.015), layer
        assert layers[layer].any_shared == pytest.approx(shared, abs=0.03), layer


@pytest.mark.parametrize(
    ("name", "requests", "overlaps", "entropy"),
    [
        ("qwen3-30b-a3b", 6, {0: 0.079, 6: 0.562, 7: 0.597, 18: 0.556, 31: 0.577, 47: 0.206}, (0.62, 0.85)),
        ("gpt-oss-20b", 32, {0: 0.19, 2: 0.37, 4: 0.49, 13: 0.61, 18: 0.34, 23: 0.60}, (0.75, 0.85)),
    ],
)
def test_overlaps_as_published(
    name: str, requests: int, overlaps: dict[int, float], entropy: tuple[float, float]
) -> None:
    found = trace_statistics(synthetic_trace(replace(MODELS[name], tokens=100, requests=requests)))
    layers = dict(found.by_layer)
    for layer, overlap in overlaps.items():
        assert layers[layer].overlap == pytest.approx(overlap, abs=0.035), layer
    assert found.mean.entropy_in_request is not None and entropy[0] < found.mean.entropy_in_request < entropy[1]
    lags = dict(found.lags)
    assert lags[8] / lags[1] == pytest.approx(0.65, abs=0.2), "most of the locality is slow"


def test_what_is_asked_for_comes_out() -> None:
    asked = SyntheticSettings(layers=3, experts=16, top_k=2, tokens=600, requests=6, repeat=0.5, overlap=0.6, topic=0.5)
    found = trace_statistics(synthetic_trace(asked))
    assert found.mean.first_repeated == pytest.approx(0.5, abs=0.02)
    assert found.mean.overlap == pytest.approx(0.6, abs=0.04)
    assert (found.prefill_tokens, found.decode_tokens, found.requests) == (6 * 32, 6 * 600, 6)
    skewed = trace_statistics(synthetic_trace(replace(asked, repeat=None, overlap=None, skew=2.0)))
    assert skewed.mean.gini > found.mean.gini + 0.2  # type: ignore[operator]
    drifting = trace_statistics(synthetic_trace(replace(asked, repeat=None, overlap=None, topic=2.0, topic_tokens=8)))
    settled = trace_statistics(synthetic_trace(replace(asked, repeat=None, overlap=None, topic=2.0, topic_tokens=9999)))
    assert dict(drifting.lags)[64] < dict(settled.lags)[64] - 0.1, "a topic that changes is forgotten"


def test_a_made_trace_is_a_trace_and_the_same_every_time(tmp_path: Path) -> None:
    settings = SyntheticSettings(layers=3, experts=8, top_k=8, tokens=9, requests=3, seed=5)
    save_trace(tmp_path / "t.npz", synthetic_trace(settings))
    trace = load_trace(tmp_path / "t.npz")
    assert np.array_equal(trace.ids, synthetic_trace(settings).ids)
    assert all(len(set(row)) == 8 for row in trace.ids.tolist())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"top_k": 9}, "top_k must be between 1 and 8"),
        ({"repeat": 1.5}, "repeat must be between 0 and 1"),
        ({"overlap": ((0, -0.1),)}, "overlap must be between 0 and 1"),
        ({"tokens": 0, "prompt_tokens": 0}, "tokens must be at least 1"),
        ({"repeat": 0.1, "skew": 3.0}, "is less than chance gives"),
    ],
)
def test_statistics_that_no_trace_can_have(change: dict[str, object], reason: str) -> None:
    with pytest.raises(SyntheticError, match=reason):
        synthetic_trace(SyntheticSettings(**{"layers": 2, "experts": 8, "top_k": 2, "requests": 1} | change))  # type: ignore[arg-type]


def test_merging_and_splitting_by_request(tmp_path: Path) -> None:
    settings = SyntheticSettings(layers=2, experts=8, top_k=2, tokens=4, requests=3, prompt_tokens=2)
    traces = [synthetic_trace(replace(settings, seed=seed)) for seed in (1, 2)]
    both = merge(traces, ["a", "b"])
    save_trace(tmp_path / "t.npz", both)
    assert np.array_equal(load_trace(tmp_path / "t.npz").ids, np.concatenate([one.ids for one in traces]))
    assert requests_of(both) == list(range(6))
    parts = folds(requests_of(both), 4)
    assert (
        sorted(request for part in parts for request in part) == list(range(6))
        and max(map(len, parts)) - min(map(len, parts)) <= 1
    )
    assert sum(len(select(both, part)) for part in parts) == len(both)
    assert np.array_equal(select(both, [3]).ids, traces[1].rows(traces[1].request == 0).ids)


@pytest.mark.parametrize(
    ("name", "overlaps", "tokens"),
    [
        ("gpt-oss-20b-decode-a", {None: 0.43, 0: 0.19, 13: 0.58, 18: 0.346}, 9544),
        ("qwen-route", {None: 0.368, 0: 0.065, 47: 0.16}, 156),
    ],
)
def test_recorded_traces(name: str, overlaps: dict[int | None, float], tokens: int) -> None:
    path = SHARED / f"{name}.npz"
    if not path.exists():
        pytest.skip("the recorded traces are not on this machine")
    found = trace_statistics(load_trace(path))
    layers: dict[int | None, object] = {None: found.mean, **dict(found.by_layer)}
    for layer, overlap in overlaps.items():
        assert layers[layer].overlap == pytest.approx(overlap, abs=0.006)  # type: ignore[attr-defined]
    assert found.decode_tokens == tokens
