"""What the engine does for measuring: prompts of ids, laps, answers of a given length, logits of all positions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import offload.generation.scoring
from offload.checkpoint.expert_file import ExpertFile
from offload.config import EngineSettings, SamplingSettings
from offload.engine import Engine
from offload.errors import ContextError, ExpertFileError, UsageError
from offload.events import PrefillProgress, Token
from offload.generation.batch import parse_row
from offload.generation.batch_files import batch_settings
from tests.engines import GREEDY, finish, open_tiny
from tests.tiny_models import EOS_ID, VOCAB_SIZE, build_tiny, reference_logits

IDS = [5, 17, 300, 42, 42, 8, 99, 120, 7, 260, 33]


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


def test_a_prompt_of_ids_is_the_prompt_of_its_text(engine: Engine) -> None:
    text = "Once upon a time"
    whole = finish(engine.generate(text, GREEDY))[1].text
    engine.reset()
    assert finish(engine.generate_ids(engine.encode(text), GREEDY))[1].text == whole


@pytest.mark.parametrize("ids", [[VOCAB_SIZE], [-1, 5], []])
def test_ids_that_are_none(engine: Engine, ids: list[int]) -> None:
    with pytest.raises(UsageError, match="vocabulary" if ids else "empty"):
        engine.generate_ids(ids, GREEDY)
    with pytest.raises(UsageError, match="vocabulary" if ids else "empty"):
        engine.score(ids)


def test_too_many_ids(engine: Engine) -> None:
    with pytest.raises(ContextError):
        engine.generate_ids([5] * 128, GREEDY)
    with pytest.raises(UsageError, match="129 tokens are more than the 128"):
        engine.score([5] * 129)


def test_ordinary_ids_are_neither_special_nor_the_end(engine: Engine) -> None:
    assert engine.ordinary_ids() == list(range(4, VOCAB_SIZE))


def test_end_tokens_can_be_ignored(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.generation.sampling.Sampler.__call__", lambda *args: EOS_ID)
    settings = SamplingSettings(temperature=0, max_new_tokens=8, ignore_eos=True)
    _, done = finish(engine.generate_ids(IDS, settings))
    assert (done.reason, done.new_tokens) == ("length", 8)


def test_a_row_of_a_batch_cannot_ignore_end_tokens() -> None:
    row = parse_row(b'{"prompt": "x", "ignore_eos": true}', 1, SamplingSettings(), 0)
    assert row.error is not None and "unknown fields: 'ignore_eos'" in row.error
    assert "ignore_eos" not in batch_settings(EngineSettings(), SamplingSettings(), 0), "an old batch can be resumed"


def test_reset_makes_the_next_prompt_prefill_anew(engine: Engine) -> None:
    def reused() -> int:
        events, _ = finish(engine.generate_ids(IDS, GREEDY))
        return next(event.reused for event in events if isinstance(event, PrefillProgress))

    assert (reused(), reused()) == (0, len(IDS) - 1)
    engine.reset()
    assert reused() == 0


def test_laps_divide_the_running_generation(engine: Engine) -> None:
    settings = SamplingSettings(temperature=1, seed=1, max_new_tokens=9, ignore_eos=True)
    finish(engine.generate_ids(IDS, settings))
    engine.lap()
    laps = []
    engine.reset()
    stream = engine.generate_ids(IDS, settings)
    tokens = 0
    for event in stream:
        tokens += isinstance(event, Token)
        if isinstance(event, Token) and tokens in (1, 4, 9):
            laps.append(engine.lap())
    first, second, third = laps
    assert [lap.new_tokens for lap in laps] == [1, 3, 5]
    assert [lap.prompt_tokens for lap in laps] == [len(IDS), 0, 0]
    assert first.ttft_s is not None and first.prefill_tokens_per_s is not None and first.decode_tokens_per_s is None
    assert second.ttft_s is None and second.prefill_tokens_per_s is None and second.decode_tokens_per_s is not None
    assert third.experts.events == 5 * 4 and third.experts.accesses <= 5 * 4 * 2
    done = finish(engine.generate_ids(IDS, settings))[1].stats  # the same tokens again
    assert done.new_tokens == 9
    whole = engine.stats()
    assert whole.new_tokens == 27
    assert whole.experts.events == sum(lap.experts.events for lap in (first, second, third, first, second, third)) + (
        done.experts.events
    )


def test_time_between_generations_is_in_no_lap(engine: Engine) -> None:
    assert engine.lap().seconds.total == 0
    finish(engine.generate_ids(IDS, GREEDY))
    assert engine.lap().seconds.total > 0
    assert engine.lap().seconds.total == 0


@pytest.mark.parametrize("chunk", [3, 512])
def test_scores_are_the_logits_of_stock_transformers(checkpoint: Path, packs: Path, chunk: int) -> None:
    expected = reference_logits(checkpoint, torch.tensor([IDS]), [])[0][0]
    with open_tiny(checkpoint, packs, residency=0.3, prefill_chunk=chunk) as engine:
        found = torch.cat(list(engine.score(IDS)))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert engine.stats().prefill_tokens_per_s is not None


def test_the_kv_cache_forgets_what_was_scored(engine: Engine) -> None:
    whole = finish(engine.generate_ids(IDS, GREEDY))[1].text
    assert sum(len(piece) for piece in engine.score(IDS * 2)) == 2 * len(IDS)
    assert engine._kv.tokens == []
    stream = engine.score(IDS * 2)
    next(stream)
    assert engine._kv.tokens
    stream.close()  # type: ignore[attr-defined]
    assert engine._kv.tokens == []
    assert finish(engine.generate_ids(IDS, GREEDY))[1].text == whole


def test_logits_are_bounded_by_bytes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.cat(list(engine.score(IDS)))
    monkeypatch.setattr(offload.generation.scoring, "_PIECE_BYTES", 2 * 4 * VOCAB_SIZE)
    pieces = list(engine.score(IDS))
    assert [len(piece) for piece in pieces] == [2, 2, 2, 2, 2, 1]
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize(("architecture", "tokens"), [("qwen2_moe", 128), ("jamba", 4)])
def test_the_chunk_of_a_large_vocabulary_is_small(
    architecture: str, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload.generation.scoring, "_LOGITS_BYTES", 4 * 4 * VOCAB_SIZE)
    folder = build_tiny(architecture, tmp_path / "checkpoint")
    with open_tiny(folder, tmp_path / "packs") as engine:
        assert engine.score_tokens == tokens, "a family that needs its prompts whole gets shorter ones"
        expected = reference_logits(folder, torch.tensor([IDS[:4]]), [])[0][0]
        torch.testing.assert_close(torch.cat(list(engine.score(IDS[:4]))), expected, rtol=1e-4, atol=1e-4)


def test_a_read_error_comes_out_of_score(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> int:
        raise ExpertFileError("record 3 of layer 2 cannot be read")

    monkeypatch.setattr(ExpertFile, "read_into", fail)
    with pytest.raises(ExpertFileError, match="record 3"):
        list(engine.score(IDS))
    monkeypatch.undo()
    assert engine._kv.tokens == []
    assert sum(len(piece) for piece in engine.score(IDS)) == len(IDS)
