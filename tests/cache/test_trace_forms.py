"""Routing written down by other programs becomes the trace that it means, and what is no such file is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cache.synthetic import SyntheticSettings, synthetic_trace
from cache.trace import TraceError, load_trace, save_trace
from cache.trace_edit import mend
from cache.trace_forms import FORMS, read_trace, write_trace

BIGMOE = """\
# route_trace v1
# model=qwen.gguf arch=qwen3moe n_layer=3 n_expert=16 n_expert_used=2
# layer=1 expert_bytes=4096 dense_bytes=9
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes,dropped
0,0,0,1,0,7,0.75,0,4096,0
0,0,0,1,1,3,0.25,0,4096,0
0,0,1,1,1,5,nan,0,4096,0
0,0,1,1,0,4,0.5,0,4096,0
0,0,0,2,0,1,0.5,0,4096,0
0,0,0,2,1,2,0.5,0,4096,0
0,0,1,2,0,2,0.5,0,4096,0
0,0,1,2,1,1,0.5,0,4096,0
0,1,2,1,0,9,0.5,1,4096,0
0,1,2,1,1,8,0.5,1,4096,0
0,1,2,2,0,6,0.5,1,4096,0
0,1,2,2,1,5,0.5,1,4096,0
"""
MOE_BEYOND = """\
Layer ID,Batch Number,Token,Activated Expert IDs
1,0,I,"[8, 22, 38]"
1,0,",","[0, 8, 11]"
2,0,I,"[3, 35, 62]"
2,0,",","[0, 15, 46]"
"""
LLAMA_SCRIPT = "layer_id,expert_ids\n3,52 40\n4,1 2\n3,32 115\n4,2 3\n"
VLLM_LOG = """\
{"type": "meta", "model_id": "Qwen/Qwen1.5-MoE", "layers_logged": [0, 1], "top_k": 2, "num_experts": 60}
{"type": "route", "req_id": "a", "token_idx": 0, "layer": 0, "topk_ids": [3, 12], "topk_weights": [0.6, 0.4]}
{"type": "route", "req_id": "a", "token_idx": 1, "layer": 0, "topk_ids": [5, 6], "topk_weights": [0.6, 0.4]}
{"type": "route", "req_id": "a", "token_idx": 0, "layer": 1, "topk_ids": [1, 2], "topk_weights": [0.6, 0.4]}
{"type": "route", "req_id": "a", "token_idx": 1, "layer": 1, "topk_ids": [2, 1], "topk_weights": [0.6, 0.4]}
{"type": "route", "req_id": "a", "token_idx": 0, "layer": 0, "topk_ids": [9, 8], "topk_weights": [0.6, 0.4]}
{"type": "route", "req_id": "a", "token_idx": 0, "layer": 1, "topk_ids": [7, 8], "topk_weights": [0.6, 0.4]}
"""
BATCHES = '{"layer": 0, "batch_id": 12, "origin_rows": [0, 0], "topk_experts": [[1, 2], [3, 4]]}\n'
VLLM = json.dumps(
    {
        "model": "m",
        "prompt_routed_experts": [[[1, 2], [3, 4]], [[5, 6], [7, 8]]],
        "choices": [{"text": "x", "routed_experts": [[[1, 5], [2, 6]]]}],
    }
)
COLIBRI = "0 0 1 7:0.5 3:0.5\n0 1 1 4:0.6 5:0.4\n1 0 2 1:0.5 2:0.5\n1 1 2 2:0.5 1:0.5\n2 0 1 9:1 8:0\n3 0 2 6:1 5:0\n"


def read(tmp_path: Path, text: str, **given: object):  # type: ignore[no-untyped-def]
    path = tmp_path / "in.txt"
    path.write_text(text, "utf-8")
    trace = read_trace(path, **given)  # type: ignore[arg-type]
    save_trace(tmp_path / "out.npz", trace)  # what is read is a trace by the strict rules
    return load_trace(tmp_path / "out.npz")


@pytest.mark.parametrize("text", [BIGMOE, COLIBRI], ids=["bigmoe", "colibri"])
def test_a_prompt_is_one_pass_and_a_decoded_token_another(tmp_path: Path, text: str) -> None:
    trace = read(tmp_path, text)
    assert trace.layer.tolist() == [1, 1, 2, 2, 1, 2]
    assert trace.step.tolist() == [0, 1, 0, 1, 2, 2]
    assert trace.phase.tolist() == [0, 0, 0, 0, 1, 1]
    assert trace.forward.tolist() == [0, 0, 0, 0, 1, 1]
    assert trace.ids.tolist() == [[7, 3], [4, 5], [1, 2], [2, 1], [9, 8], [6, 5]]


def test_what_a_file_says_of_its_model(tmp_path: Path) -> None:
    trace = read(tmp_path, BIGMOE)
    assert trace.meta == {
        "model": "qwen.gguf", "layers": 2, "experts": 16, "top_k": 2, "source": "in.txt", "expert_bytes": 4096
    }  # fmt: skip
    assert trace.weights.tolist()[:2] == [[0.75, 0.25], [0.5, 0.0]], "an unknown weight counts as 0"
    assert read(tmp_path, COLIBRI).experts == 10, "as many as the ids tell"
    assert read(tmp_path, COLIBRI, experts=64, model="x").meta["experts"] == 64


def test_tables_without_phase_and_step(tmp_path: Path) -> None:
    trace = read(tmp_path, MOE_BEYOND)
    assert trace.phase.tolist() == [1] * 4 and trace.step.tolist() == [0, 0, 1, 1]
    assert trace.layer.tolist() == [1, 2, 1, 2] and trace.ids[2].tolist() == [0, 8, 11]
    assert read(tmp_path, MOE_BEYOND, phase=0).forward.tolist() == [0] * 4
    trace = read(tmp_path, LLAMA_SCRIPT)
    assert trace.layer.tolist() == [3, 4, 3, 4] and trace.forward.tolist() == [0, 0, 1, 1]


def test_a_logger_of_vllm_that_counts_tokens_within_a_batch(tmp_path: Path) -> None:
    trace = read(tmp_path, VLLM_LOG)
    assert (trace.meta["model"], trace.experts) == ("Qwen/Qwen1.5-MoE", 60)
    assert trace.step.tolist() == [0, 0, 1, 1, 2, 2]
    assert trace.ids.tolist() == [[3, 12], [1, 2], [5, 6], [2, 1], [9, 8], [7, 8]]
    assert trace.weights[0].tolist() == pytest.approx([0.6, 0.4], abs=1e-3)
    assert read(tmp_path, BATCHES).ids.tolist() == [[1, 2], [3, 4]]


def test_answers_of_a_vllm_server(tmp_path: Path) -> None:
    trace = read(tmp_path, VLLM + "\n" + VLLM)
    assert trace.request.tolist() == [0] * 6 + [1] * 6
    assert trace.phase.tolist() == [0, 0, 0, 0, 1, 1] * 2
    assert trace.ids[:6].tolist() == [[1, 2], [5, 6], [3, 4], [7, 8], [1, 5], [2, 6]]
    assert trace.forward.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3]


def test_rows_of_different_width_are_filled_with_no_expert(tmp_path: Path) -> None:
    trace = read(tmp_path, "layer,experts\n0,1 2\n0,3\n")
    assert trace.ids.tolist() == [[1, 2], [3, 4]] and trace.experts == 4


@pytest.mark.parametrize("suffix", [".npz", ".csv", ".jsonl"])
def test_there_and_back(tmp_path: Path, suffix: str) -> None:
    trace = synthetic_trace(SyntheticSettings(layers=3, experts=8, top_k=2, tokens=5, requests=2, prompt_tokens=3))
    write_trace(tmp_path / f"t{suffix}", trace)
    again = read_trace(tmp_path / f"t{suffix}")
    for name in ("request", "phase", "step", "forward", "layer", "ids"):
        assert np.array_equal(getattr(trace, name), getattr(again, name)), name
    assert np.allclose(trace.weights, again.weights, atol=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == [f"t{suffix}"]


BAD = {
    "empty": ("", "the file is empty"),
    "a letter": ("Dear Sir,\n", "of no known form; name one with --form"),
    "no rows": ("layer,experts\n", "there are no rows"),
    "no ids": ("layer,experts\n0,\n", "line 2: no experts"),
    "words for ids": ("layer,experts\n0,one two\n", "line 2: 'one two' is not a list of whole numbers"),
    "a short row": ("layer,experts\n0,1\n0\n", "line 3: 1 columns instead of 2"),
    "a bad phase": ("phase,layer,experts\nx,0,1\n", "phase 'x' is not one of"),
    "weights of another number": ("layer,experts,weights\n0,1 2,0.5\n", "2 experts but 1 weights"),
    "a broken line": ('{"layer": 0, "topk_ids": [1]}\n{"layer": 0, "topk', "line 2: not JSON"),
    "ids of text": ('{"layer": 0, "topk_ids": ["a"]}\n', "line 1: .* is not a list of whole numbers"),
    "no layer": ('{"type": "meta"}\n{"topk_ids": [1]}\n', "line 2: an object needs 'layer'"),
    "no routing": ('{"routed_experts": [], "choices": [{}]}\n', "no 'routed_experts'; start the server with"),
    "colibri cut off": ("0 0 1 7:0.5\n0 0\n", "line 2: expected CALL ROW LAYER"),
    "too many experts": ("layer,experts\n0,70000\n", "'experts', a whole number from 1 to"),
    "a negative layer": ("layer,experts\n-1,1\n", "layer is out of range"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_get_one_clear_line(tmp_path: Path, name: str) -> None:
    text, reason = BAD[name]
    with pytest.raises(TraceError, match=reason) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'in.txt'}") and "\n" not in str(caught.value)


def test_other_errors(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("layer,experts\n0,1\n")
    (tmp_path / "latin.csv").write_bytes(b"layer,experts\n0,1\n0,\xff\n")
    for path, given, reason in (
        (tmp_path / "none.csv", {}, "there is no such file"),
        (tmp_path, {}, "cannot be read"),
        (tmp_path / "latin.csv", {}, r"not UTF-8"),
        (tmp_path / "table.csv", {"form": "x"}, f"there is no form 'x'; there are {', '.join(FORMS)}"),
        (tmp_path / "table.csv", {"form": "colibri"}, r"line 1: expected CALL"),
    ):
        with pytest.raises(TraceError, match=reason):
            read_trace(path, **given)  # type: ignore[arg-type]


def test_mending_puts_rows_in_order_and_drops_weights_that_are_none(tmp_path: Path) -> None:
    trace = synthetic_trace(SyntheticSettings(layers=3, experts=8, top_k=2, tokens=4, requests=2, prompt_tokens=3))
    mixed = trace.rows(np.random.default_rng(0).permutation(len(trace)))
    mixed.weights[3, 0] = np.nan
    save_trace(tmp_path / "bad.npz", mixed)
    with pytest.raises(TraceError):
        load_trace(tmp_path / "bad.npz")
    mended = mend(tmp_path / "bad.npz")
    assert np.array_equal(mended.ids, trace.ids) and np.array_equal(mended.step, trace.step)
    assert np.isfinite(mended.weights).all()
