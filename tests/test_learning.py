"""What ``--learn-from`` teaches: policies and predictors start with what earlier sessions did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cache.trace import TraceRecorder, load_trace
from offload.errors import RunLocalError, UsageError
from offload.learning import earlier_events
from tests.engines import GREEDY, finish, open_tiny
from tests.tiny_models import build_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("qwen2_moe", tmp_path_factory.mktemp("tiny") / "checkpoint")


def record(path: Path, layers: range = range(2), experts: int = 4, tokens: int = 3) -> Path:
    recorder = TraceRecorder("tiny", len(layers), experts, 1, path.parent)
    for step in range(tokens):
        for layer in layers:
            recorder.record(
                request=0, phase=1, step=step, forward=step, layer=layer, ids=np.array([[1]]), weights=np.ones((1, 1))
            )
    recorder.save(path)
    return path


def test_events_of_several_traces(tmp_path: Path) -> None:
    files = [record(tmp_path / "a.npz"), record(tmp_path / "b.npz", tokens=5)]
    events = earlier_events(files, [0, 1], 4)
    assert events is not None and len(events) == 2 * (3 + 5)
    assert earlier_events([], [0, 1], 4) is None


def test_traces_of_other_models_and_no_traces(tmp_path: Path) -> None:
    file = record(tmp_path / "a.npz")
    with pytest.raises(UsageError, match=r"--learn-from: .*a.npz is of another model \(tiny, with 4 experts a layer"):
        earlier_events([file], [0, 1], 8)
    with pytest.raises(UsageError, match=r"with layer 1; this one has 4 experts in 1 layers"):
        earlier_events([file], [0], 4)
    with pytest.raises(RunLocalError, match=r"--learn-from: .*none.npz: there is no such file"):
        earlier_events([tmp_path / "none.npz"], [0], 4)


def test_a_log_must_hold_all_that_the_cache_knew(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--cache-log cannot be combined with --learn-from"):
        open_tiny(checkpoint, tmp_path, learn_from=(tmp_path / "t.npz",), cache_log=tmp_path / "c.log")


def test_an_engine_that_has_learned(checkpoint: Path, tmp_path: Path) -> None:
    packs, trace = tmp_path / "packs", tmp_path / "t.npz"
    with open_tiny(checkpoint, packs, residency=0.5, trace_out=trace) as engine:
        tokens = [event for event in finish(engine.generate("first prompt", GREEDY))[0]][:-1]
    recorded = load_trace(trace)
    with open_tiny(
        checkpoint, packs, residency=0.5, policy="static", prefetch="popularity", learn_from=(trace, trace)
    ) as engine:
        again = [event for event in finish(engine.generate("first prompt", GREEDY))[0]][:-1]
        layer = int(recorded.layer[0])
        uses = np.bincount(recorded.ids[recorded.layer == layer].ravel(), minlength=8)
        scores = [engine._runtime.cache.policy.score((layer, expert)) for expert in range(8)]
        assert (np.array(scores) > 0).tolist() == (uses > 0).tolist()
        assert next(engine._runtime.predictor.guesses(layer, torch.zeros(1, 8), 2))  # before it has seen anything
    assert [getattr(event, "text", "") for event in tokens] == [getattr(event, "text", "") for event in again]
