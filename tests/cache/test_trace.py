"""Routing traces round-trip, and damaged ones are refused with a reason."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

from cache.trace import DECODE, PREFILL, TraceError, TraceRecorder, load_trace, save_trace


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


def test_a_pass_of_several_requests(tmp_path: Path) -> None:
    recorder = TraceRecorder("tiny", 1, 8, 2, tmp_path)
    recorder.record(
        request=np.array([3, 5]), phase=np.array([DECODE, PREFILL]), step=np.array([70, 4]), forward=9, layer=0,
        ids=np.array([[1, 2], [3, 4]]), weights=np.ones((2, 2)),
    )  # fmt: skip
    recorder.record(
        request=5, phase=DECODE, step=5, forward=10, layer=0, ids=np.array([[0, 1]]), weights=np.ones((1, 2))
    )
    recorder.save(tmp_path / "t.npz")
    trace = load_trace(tmp_path / "t.npz")
    assert trace.request.tolist() == [3, 5, 5] and trace.step.tolist() == [70, 4, 5]
    assert trace.phase.tolist() == [1, 0, 1] and trace.forward.tolist() == [9, 9, 10]


def test_memory_stays_bounded_and_the_spool_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TraceRecorder, "SPOOL_ROWS", 8)
    recorder = TraceRecorder("tiny", 1, 8, 2, tmp_path)
    for step in range(100):
        ids = np.array([[step % 8, (step + 1) % 8]])
        recorder.record(request=0, phase=1, step=step, forward=step, layer=0, ids=ids, weights=np.ones((1, 2)))
        assert len(recorder._events) < 8
    assert list(tmp_path.iterdir()) == [], "the spool has no name"
    for name in ("a.npz", "b.npz"):  # a live trace may be looked at and go on
        recorder.save(tmp_path / name)
        trace = load_trace(tmp_path / name)
        so_far = recorder.trace()
        assert so_far.meta == trace.meta
        assert all(np.array_equal(getattr(so_far, name), getattr(trace, name)) for name in ("step", "ids", "weights"))
        assert trace.step.tolist() == list(range(len(trace)))
        assert trace.ids[:, 0].tolist() == [step % 8 for step in range(len(trace))]
        recorder.record(
            request=0, phase=1, step=100, forward=100, layer=0, ids=np.array([[4, 5]]), weights=np.ones((1, 2))
        )
    assert len(trace) == 101


def test_a_full_disk_is_said_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TraceRecorder, "SPOOL_ROWS", 1)
    recorder = TraceRecorder("tiny", 1, 8, 2, tmp_path / "missing")
    recorder.record(request=0, phase=1, step=0, forward=0, layer=0, ids=np.array([[1, 2]]), weights=np.ones((1, 2)))
    with pytest.raises(OSError):
        recorder.save(tmp_path / "t.npz")
    assert list(tmp_path.iterdir()) == []


def test_ids_of_no_expert_are_one_number(tmp_path: Path) -> None:
    recorder = TraceRecorder("tiny", 1, 8, 0, tmp_path)
    recorder.record(
        request=0, phase=1, step=0, forward=0, layer=0, ids=np.array([[-1, 2, 30]]), weights=np.ones((1, 3))
    )
    recorder.save(tmp_path / "t.npz")
    trace = load_trace(tmp_path / "t.npz")
    assert trace.ids.tolist() == [[8, 2, 8]]
    assert trace.top_k == 3, "as wide as the router, whatever the config said"


META = {"model": "tiny", "layers": 2, "experts": 8, "top_k": 2}
BAD: dict[str, tuple[dict[str, object], str]] = {
    "no ids": ({"ids": None}, r"no ids\); record it again"),
    "no meta": ({"meta": None}, "no meta"),
    "meta is no JSON": ({"meta": np.array("{")}, "meta is not a JSON object"),
    "meta is a list": ({"meta": np.array("[]")}, "meta is not a JSON object"),
    "meta is a number": ({"meta": np.array(3)}, "meta is not a JSON text"),
    "meta lacks experts": ({"meta": np.array('{"model": "x", "layers": 2, "top_k": 2}')}, "meta needs 'experts'"),
    "meta has no layers": ({"meta": np.array(json.dumps(META | {"layers": 0}))}, "meta needs 'layers'"),
    "meta has a true top_k": ({"meta": np.array(json.dumps(META | {"top_k": True}))}, "meta needs 'top_k'"),
    "model is a number": ({"meta": np.array(json.dumps(META | {"model": 1}))}, "meta needs 'model'"),
    "short column": ({"layer": np.zeros(7, np.int16)}, "columns of different length"),
    "column of two axes": ({"step": np.zeros((8, 1), np.int32)}, "columns of different length"),
    "flat ids": ({"ids": np.zeros(8, np.int16)}, r"ids has the shape \(8,\)"),
    "wide ids": ({"ids": np.zeros((8, 3), np.int16)}, r"ids has the shape \(8, 3\)"),
    "scalar ids": ({"ids": np.array(1, np.int16)}, "rows of ids"),
    "narrow weights": ({"weights": np.zeros((8, 1), np.float16)}, r"weights has the shape \(8, 1\)"),
    "ids of floats": ({"ids": np.zeros((8, 2))}, "ids is of type float64"),
    "steps of text": ({"step": np.array(["a"] * 8)}, "step is of type <U1"),
    "weights of ints": ({"weights": np.zeros((8, 2), int)}, "weights are of type int64"),
    "objects": ({"step": np.array([{}] * 8, dtype=object)}, "not a routing trace"),
    "negative id": ({"ids": np.full((8, 2), -1)}, r"ids is out of range \(-1"),
    "id too large": ({"ids": np.full((8, 2), 9)}, r"id of row 0 is out of range \(9, but meta says 8 experts"),
    "id beyond int16": ({"ids": np.full((8, 2), 1 << 40)}, "ids is out of range"),
    "phase 2": ({"phase": np.full(8, 2, np.uint8)}, "phase must be 0"),
    "many layers": ({"layer": np.arange(8, dtype=np.int16)}, "rows of 8 layers, but meta says 2"),
    "NaN": ({"weights": np.full((8, 2), np.nan)}, "weights of row 0 are not all finite"),
    "infinity": ({"weights": np.full((8, 2), np.inf, np.float32)}, "weights of row 0 are not all finite"),
    "too large for float16": ({"weights": np.full((8, 2), 1e6)}, "weights of row 0 are not all finite"),
    "passes backwards": ({"forward": np.arange(8, 0, -1)}, r"row 1: forward pass 7 of layer 0 comes after"),
    "an event in two pieces": (
        {"forward": np.zeros(8, int), "layer": np.array([0, 0, 1, 1, 0, 0, 1, 1])}, "row 4: .* was there before"
    ),
    "steps backwards": ({"step": np.array([0, 1, 0, 3] * 2)}, "row 2: step 0 of request 0 in layer 0 comes after"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_traces_get_one_clear_line(tmp_path: Path, name: str) -> None:
    changes, reason = BAD[name]
    with np.load(recorded(tmp_path / "t.npz")) as file:
        columns = {name: file[name] for name in file.files}
    np.savez(tmp_path / "bad.npz", **{key: value for key, value in (columns | changes).items() if value is not None})
    with pytest.raises(TraceError, match=reason) as caught:
        load_trace(tmp_path / "bad.npz")
    assert str(caught.value).startswith(f"{tmp_path / 'bad.npz'}: ") and "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    whole = recorded(tmp_path / "t.npz").read_bytes()
    (tmp_path / "text.npz").write_text("no trace")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 0xFF
    (tmp_path / "flipped.npz").write_bytes(bytes(flipped))
    np.savez(tmp_path / "other.npz", numbers=np.arange(3))
    for name, reason in (
        ("text.npz", "trace convert"),
        ("empty.npz", "trace convert"),
        ("cut.npz", "damaged or cut off"),
        ("flipped.npz", "damaged|not a routing trace|cannot be read"),
        ("other.npz", "no meta"),
        ("missing.npz", "no such file"),
        (".", "is a folder"),
    ):
        with pytest.raises(TraceError, match=reason) as caught:
            load_trace(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_whatever_is_damaged_ends_in_one_line(tmp_path: Path) -> None:
    whole = recorded(tmp_path / "t.npz").read_bytes()
    random = np.random.default_rng(0)
    bad = tmp_path / "bad.npz"
    for _ in range(300):
        data = bytearray(whole)
        data[int(random.integers(len(whole)))] = int(random.integers(256))
        bad.write_bytes(bytes(data[: int(random.integers(2, len(whole)))]) if random.random() < 0.2 else bytes(data))
        with contextlib.suppress(TraceError):
            load_trace(bad)


def test_a_trace_of_the_older_form_whose_rows_run_layer_by_layer(tmp_path: Path) -> None:
    """Without ``forward``, rows of one layer for many steps and then of the next are passes of their own."""
    rows = 6
    np.savez(
        tmp_path / "t.npz",
        request=np.zeros(rows, np.int32), phase=np.ones(rows, np.uint8), step=np.array([0, 1, 2] * 2, np.int32),
        layer=np.repeat(np.array([0, 1], np.int16), 3), ids=np.zeros((rows, 2), np.int16),
        weights=np.zeros((rows, 2), np.float16), meta=np.array(json.dumps(META)),
    )  # fmt: skip
    assert load_trace(tmp_path / "t.npz").forward.tolist() == list(range(rows))


def test_saving_what_was_loaded(tmp_path: Path) -> None:
    trace = load_trace(recorded(tmp_path / "t.npz"))
    save_trace(tmp_path / "copy.npz", trace)
    again = load_trace(tmp_path / "copy.npz")
    for name in ("request", "phase", "step", "forward", "layer", "ids", "weights"):
        assert np.array_equal(getattr(trace, name), getattr(again, name))
    assert again.meta == trace.meta


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        TraceRecorder("tiny", 2, 8, 2).save(tmp_path / "missing" / "t.npz")
    assert list(tmp_path.iterdir()) == []
