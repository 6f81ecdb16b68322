"""Perplexity and KL against a direct computation with transformers, and the file between two runs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import offload.bench.reference as reference
from offload.bench.perplexity import PerplexityReport, cut_windows, evaluate
from offload.engine import Engine
from offload.errors import RunLocalError, UsageError
from tests.engines import open_tiny
from tests.tiny_models import VOCAB_SIZE, build_tiny, load_reference

TEXT = "the expert that the router picks is loaded from the disk; what is the capital of France? " * 6
WINDOW = 48
Evaluate = Callable[..., PerplexityReport]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return build_tiny("qwen2_moe", folder / "a"), build_tiny("qwen2_moe", folder / "b", seed=1)


def opened(checkpoint: Path, folder: Path, **settings: Any) -> Engine:
    return open_tiny(checkpoint, folder, context_tokens=WINDOW, prefill_chunk=20, **settings)


@pytest.fixture(scope="module")
def engines(checkpoints: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Engine]]:
    folder = tmp_path_factory.mktemp("packs")
    first, second = checkpoints
    engines = [opened(first, folder), opened(first, folder, residency=0.3), opened(second, folder)]
    yield engines
    for engine in engines:
        engine.close()


def run(engine: Engine, text: str = TEXT, tokens: int | None = None, **files: Path) -> PerplexityReport:
    chosen = {"reference": None, "reference_out": None} | files
    return evaluate(engine, text, "text.txt", tokens, on_event=lambda event: None, **chosen)


def stock_log_probabilities(checkpoint: Path, windows: list[list[int]]) -> list[torch.Tensor]:
    """Of each window, [positions, V] in float64."""
    model = load_reference(checkpoint)
    with torch.inference_mode():
        return [model(torch.tensor([w])).logits[0, :-1].double().log_softmax(-1) for w in windows]


@pytest.mark.parametrize("tokens", [None, 100, 2])
def test_perplexity_is_that_of_stock_transformers(
    checkpoints: tuple[Path, Path], engines: list[Engine], tokens: int | None
) -> None:
    ids = engines[0].encode(TEXT)[:tokens]
    windows = cut_windows(ids, WINDOW)
    logs = stock_log_probabilities(checkpoints[0], windows)
    nll = [-log[range(len(w) - 1), w[1:]].sum().item() for log, w in zip(logs, windows, strict=True)]
    counted = sum(len(window) - 1 for window in windows)
    for engine in engines[:2]:
        report = run(engine, tokens=tokens)
        assert (report.tokens, report.counted_tokens, report.windows) == (len(ids), counted, len(windows))
        assert report.mean_nll_nats == pytest.approx(sum(nll) / counted, rel=1e-6)
        assert report.perplexity == pytest.approx(math.exp(sum(nll) / counted), rel=1e-5)


def test_a_setting_has_no_distance_to_itself(engines: list[Engine], tmp_path: Path) -> None:
    alone = run(engines[0], reference_out=tmp_path / "ref")
    for engine in engines[:2]:  # another residency is the same setting
        found = run(engine, reference=tmp_path / "ref").reference
        assert found is not None and alone.reference is None
        assert (found.perplexity_ratio, found.mean_kl_nats, found.top_token_agreement) == (1.0, 0.0, 1.0)


def test_the_distance_is_that_of_stock_transformers(
    checkpoints: tuple[Path, Path], engines: list[Engine], tmp_path: Path
) -> None:
    first = run(engines[0], reference_out=tmp_path / "ref")
    second = run(engines[2], reference=tmp_path / "ref")
    windows = cut_windows(engines[0].encode(TEXT), WINDOW)
    p, q = (torch.cat(stock_log_probabilities(checkpoint, windows)) for checkpoint in checkpoints)
    found = second.reference
    assert found is not None and found.exact and found.kept_tokens == VOCAB_SIZE
    assert found.mean_kl_nats == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-5)
    assert found.top_token_agreement == pytest.approx((p.argmax(1) == q.argmax(1)).double().mean().item())
    assert found.perplexity_ratio == pytest.approx(second.perplexity / first.perplexity)


def test_of_a_large_vocabulary_the_likeliest_tokens_are_kept(
    checkpoints: tuple[Path, Path], engines: list[Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(engines[0], reference_out=tmp_path / "whole")
    exact = run(engines[2], reference=tmp_path / "whole").reference
    monkeypatch.setattr(reference, "KEPT_TOKENS", 32)
    run(engines[0], reference_out=tmp_path / "ref")
    assert (tmp_path / "ref").stat().st_size < (tmp_path / "whole").stat().st_size / 4
    itself, other = (run(engine, reference=tmp_path / "ref").reference for engine in (engines[1], engines[2]))
    assert itself is not None and other is not None and exact is not None
    assert (itself.mean_kl_nats, itself.top_token_agreement) == (0.0, 1.0)
    assert 0 < other.mean_kl_nats < exact.mean_kl_nats, "a lower bound"
    assert not other.exact
    assert other.top_token_agreement == exact.top_token_agreement
    windows = cut_windows(engines[0].encode(TEXT), WINDOW)
    p, q = (torch.cat(stock_log_probabilities(checkpoint, windows)).exp() for checkpoint in checkpoints)
    kept = p.topk(32).indices
    grouped = [torch.cat((x.gather(1, kept), 1 - x.gather(1, kept).sum(1, keepdim=True)), 1) for x in (p, q)]
    expected = (grouped[0] * (grouped[0].log() - grouped[1].log())).sum(1).mean().item()
    assert other.mean_kl_nats == pytest.approx(expected, rel=1e-4)


def test_the_file_is_read_piece_by_piece(
    engines: list[Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(engines[0], reference_out=tmp_path / "ref")
    monkeypatch.setattr("offload.generation.scoring._PIECE_BYTES", 3 * 4 * VOCAB_SIZE)
    seen = []
    read = reference.ReferenceReader.next
    monkeypatch.setattr(reference.ReferenceReader, "next", lambda self, n: (seen.append(n), read(self, n))[1])
    found = run(engines[1], reference=tmp_path / "ref").reference
    assert max(seen) == 3
    assert found is not None and found.mean_kl_nats == 0.0


def test_other_tokens_or_windows_are_refused(
    engines: list[Engine], checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    run(engines[0], reference_out=tmp_path / "ref")
    for text, tokens, message in ((TEXT, 30, "tokens to predict"), (TEXT[::-1], None, "tokens")):
        with pytest.raises(UsageError, match=f"--reference: .*ref was made from a with .*{message}.*both sides"):
            run(engines[0], text, tokens, reference=tmp_path / "ref")
    with (
        open_tiny(checkpoints[0], tmp_path / "packs", context_tokens=24) as engine,
        pytest.raises(UsageError, match=r"with 48 tokens in a window \(--ctx\) where this run has 24"),
    ):
        run(engine, reference=tmp_path / "ref")


def test_windows_that_are_longer_than_the_text_are_the_same(
    engines: list[Engine], checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    run(engines[0], tokens=20, reference_out=tmp_path / "ref")
    with open_tiny(checkpoints[0], tmp_path / "packs", context_tokens=24) as engine:
        found = run(engine, tokens=20, reference=tmp_path / "ref").reference
    assert found is not None and found.mean_kl_nats == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("content", [b"", b"something else", b"run-local reference 1\n{", None])
def test_files_that_are_no_reference(engines: list[Engine], tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ref"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"--reference: .*ref (is no file of --reference-out|cannot be read)"):
        run(engines[0], reference=path)


def test_a_reference_that_is_not_whole(engines: list[Engine], tmp_path: Path) -> None:
    run(engines[0], reference_out=tmp_path / "ref")
    os.truncate(tmp_path / "ref", (tmp_path / "ref").stat().st_size - 1)
    with pytest.raises(UsageError, match="ref is not whole; write it again"):
        run(engines[0], reference=tmp_path / "ref")


def test_a_disk_without_room_is_refused_before_anything_is_computed(
    engines: list[Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_free_bytes", lambda file: 300 * 2**20)
    run(engines[0], reference_out=tmp_path / "ref")
    monkeypatch.setattr(reference, "_free_bytes", lambda file: 256 * 2**20)
    monkeypatch.setattr(engines[0], "score", None)
    with pytest.raises(RunLocalError, match=r"probabilities need .* of disk, and 256 MiB are free there .*--tokens"):
        run(engines[0], reference_out=tmp_path / "ref")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_disk_that_runs_full(engines: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_free_bytes", lambda file: 2**40)
    with pytest.raises(RunLocalError, match=r"/dev/full: the reference cannot be written \(No space left on device\)"):
        run(engines[0], reference_out=Path("/dev/full"))


def test_a_place_that_cannot_be_written(engines: list[Engine], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--reference-out: .* cannot be written"):
        run(engines[0], reference_out=tmp_path / "no" / "ref")


def test_fewer_than_two_tokens(engines: list[Engine]) -> None:
    with pytest.raises(UsageError, match=r"text\.txt gives 1 tokens with this tokenizer; at least 2 are needed"):
        run(engines[0], "a")


def test_a_model_that_computes_no_numbers(engines: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    score = Engine.score
    monkeypatch.setattr(Engine, "score", lambda self, ids: (piece * math.nan for piece in score(self, ids)))
    with pytest.raises(RunLocalError, match="the model computes no probabilities for this text"):
        run(engines[0])


def test_tables_and_json(engines: list[Engine], tmp_path: Path) -> None:
    reports = [run(engines[0], reference_out=tmp_path / "r"), run(engines[2], reference=tmp_path / "r")]
    for report in reports:
        found = json.loads(json.dumps(report.to_json(), allow_nan=False))
        assert set(found) == {
            "file", "tokens", "counted_tokens", "windows", "window_tokens", "mean_nll_nats", "perplexity", "reference",
            "stats",
        }  # fmt: skip
        assert {len(row) for row in report.rows()} == {3}
    assert reports[0].to_json()["reference"] is None
    assert set(reports[1].to_json()["reference"]) == {
        "perplexity_ratio", "mean_kl_nats", "top_token_agreement", "kept_tokens", "exact"
    }  # fmt: skip


def test_windows() -> None:
    assert cut_windows([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4]], "the last one has nothing to predict"
    assert cut_windows([1, 2, 3, 4, 5], 3) == [[1, 2, 3], [4, 5]]
    assert cut_windows([1, 2, 3, 4, 5], 3, begin=1) == [[1, 2, 3], [1, 4, 5]]
    assert cut_windows([2, 3, 4], 3, begin=1) == [[2, 3, 4]], "this tokenizer does not put it there"
    assert cut_windows([1], 3) == cut_windows([1], 3, begin=1) == cut_windows([], 3) == []
