"""Prompts of many thousand tokens: in chunks, whose activations are all that a longer prompt does not add to."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload.config import SamplingSettings
from offload.errors import BudgetError
from tests.engines import finish, open_tiny
from tests.tiny_models import build_tiny

LONG = 16_000
MIB = 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32}
    folder = tmp_path_factory.mktemp("long") / "checkpoint"
    return build_tiny("olmoe", folder, sizes=sizes | {"max_position_embeddings": 2 * LONG})


def test_a_prompt_of_sixteen_thousand_tokens(checkpoint: Path, tmp_path: Path) -> None:
    ids = [3 + number * number % 300 for number in range(LONG)]
    greedy = SamplingSettings(temperature=0, max_new_tokens=4, ignore_eos=True)
    with open_tiny(checkpoint, tmp_path, context_tokens=LONG + 64, residency=0.5) as engine:
        done = finish(engine.generate_ids(ids, greedy))[1]
        assert (done.error, done.prompt_tokens, done.new_tokens) == (None, LONG, 4)
        stats = engine.stats()
        assert stats.prefill_passes == -(-LONG // 512)
        assert stats.bytes.needed is not None
        assert stats.bytes.disk_read <= stats.bytes.needed + 2 * stats.prefill_passes * engine.plan.sizes.slot_bytes


def test_a_longer_context_costs_its_kv_cache_and_what_one_chunk_sees(tmp_path: Path) -> None:
    folder = build_tiny("gpt_oss", tmp_path / "checkpoint", sizes={"max_position_embeddings": 32768})

    def sizes(context: int, chunk: int | None = 512) -> tuple[int, int, int]:
        with open_tiny(folder, tmp_path, context_tokens=context, prefill_chunk=chunk, residency=0.5) as engine:
            found = engine.plan.sizes
            return found.kv_bytes, found.activation_bytes, found.chunk_tokens

    (short_kv, short, _), (long_kv, long, _) = sizes(1024), sizes(16384)
    per_key = 4 * (4 + 2 * 4) + 4 + 2 * 4 * 16 * 4 // 512  # eager scores of 4 heads, the mask, keys of all heads
    assert long_kv > 10 * short_kv
    assert long - short == pytest.approx(512 * (16384 - 1024) * per_key, rel=0.01)


def test_auto_takes_a_chunk_that_fits(tmp_path: Path) -> None:
    """Eager attention holds the scores of a chunk against the context: with little memory chunks are small."""
    folder = build_tiny("gpt_oss", tmp_path / "checkpoint", sizes={"max_position_embeddings": 32768})
    settings = {"context_tokens": 16384, "residency": 0.5}
    with pytest.raises(BudgetError) as caught:
        open_tiny(folder, tmp_path, prefill_chunk=512, ram=MIB, **settings)
    smallest = int(str(caught.value).split("works is --ram ")[1].split("MiB")[0]) * MIB
    with pytest.raises(BudgetError):
        open_tiny(folder, tmp_path, prefill_chunk=512, ram=smallest - 64 * MIB, **settings)
    with open_tiny(folder, tmp_path, prefill_chunk=None, ram=smallest - 64 * MIB, **settings) as engine:
        sizes = engine.plan.sizes
        assert sizes.chunk_tokens < 512 and sizes.chunk is not None
        assert any("--prefill-chunk auto" in line for line in engine.plan.summary())
        assert engine._prefill_chunk == sizes.chunk_tokens
        done = finish(engine.generate_ids(range(3, 303), SamplingSettings(temperature=0, max_new_tokens=2)))[1]
        assert done.error is None
        assert engine.stats().prefill_passes == -(-300 // sizes.chunk_tokens)
