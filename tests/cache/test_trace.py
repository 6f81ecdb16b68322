"""Routing traces round-trip, and damaged ones are refused with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache.trace import DECODE, PREFILL, TraceError, TraceRecorder, load_trace


def recorded(path: Path) -> Path:
    recorder = TraceRecorder("tiny", layers=2, experts=8, top_k=2)
    for layer in (0, 1):
        recorder.record(
            request=0, phase=PREFILL, step=0, forward=0, layer=layer,
            ids=np.array([[1, 2], [3, 4], [5, 6]]), weights=np.full((3, 2), 0.5),
        )  # fmt: skip
        recorder.record(
            request=0, phase=DECODE, step=3, forward=1, layer=layer,
            ids=np.array([[7, 0]]), weights=np.array([[0.75, 0.25]]),
        )  # fmt: skip
    recorder.save(path)
    return path


def test_round_trip(tmp_path: Path) -> None:
    trace = load_trace(recorded(tmp_path / "t.npz"))
    assert trace.meta == {"model": "tiny", "layers": 2, "experts": 8, "top_k": 2}
    assert trace.step.tolist() == [0, 1, 2, 3] * 2
    assert trace.phase.tolist() == [0, 0, 0, 1] * 2
    assert trace.forward.tolist() == [0, 0, 0, 1] * 2
    assert trace.layer.tolist() == [0] * 4 + [1] * 4
    assert trace.ids[:4].tolist() == [[1, 2], [3, 4], [5, 6], [7, 0]]
    assert (trace.ids.dtype, trace.weights.dtype, trace.step.dtype) == (np.int16, np.float16, np.int32)
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.npz"]


def test_an_empty_recording_is_a_trace(tmp_path: Path) -> None:
    TraceRecorder("tiny", 2, 8, 2).save(tmp_path / "t.npz")
    assert load_trace(tmp_path / "t.npz").ids.shape == (0, 2)


def test_a_trace_without_forward_gets_one_pass_a_step(tmp_path: Path) -> None:
    with np.load(recorded(tmp_path / "t.npz")) as file:
        columns = {name: file[name] for name in file.files if name != "forward"}
    np.savez(tmp_path / "old.npz", **columns)
    assert load_trace(tmp_path / "old.npz").forward.tolist() == list(range(8))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no trace")
    np.savez(tmp_path / "other.npz", numbers=np.arange(3))
    with np.load(recorded(tmp_path / "t.npz")) as file:
        columns = {name: file[name] for name in file.files}
    np.savez(tmp_path / "short.npz", **(columns | {"layer": columns["layer"][:-1]}))
    for name, reason in (("text", "not a routing trace"), ("other", "no ids"), ("short", "different length")):
        with pytest.raises(TraceError, match=reason):
            load_trace(tmp_path / f"{name}.npz")


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        TraceRecorder("tiny", 2, 8, 2).save(tmp_path / "missing" / "t.npz")
    assert list(tmp_path.iterdir()) == []
