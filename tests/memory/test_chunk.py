"""How many tokens of a prompt run at once: what ``--prefill-chunk auto`` weighs."""

from __future__ import annotations

import pytest

from offload.config import DEFAULT_PREFILL_CHUNK
from offload.memory.activations import activation_bytes
from offload.memory.chunk import CANDIDATES, choose_chunk
from offload.memory.rows import GainCurve

OLMOE = GainCurve(layers=16, experts=64, top_k=8, record_bytes=3_538_944, skeleton_bytes=300_000_000)
ALL = 16 * 64


def test_the_default_is_a_candidate() -> None:
    assert CANDIDATES[0] == 64 and CANDIDATES[-1] == 16384 and DEFAULT_PREFILL_CHUNK in CANDIDATES


def test_a_chunk_that_costs_nothing_is_as_long_as_it_saves_reads() -> None:
    choice = choose_chunk(dict.fromkeys(CANDIDATES, ALL // 2), OLMOE, 16384)
    assert choice.tokens >= 4096
    assert choice.default_read is not None
    passes, default_passes = -(-choice.prompt // choice.tokens), -(-choice.prompt // 512)
    assert choice.read / choice.default_read == pytest.approx(passes / default_passes, rel=0.01)
    assert "by 512 it were" in choice.summary()


def test_slots_that_activations_take_weigh_against_it() -> None:
    dear = {chunk: max(1, ALL // 2 - chunk // 4) for chunk in CANDIDATES}
    assert choose_chunk(dear, OLMOE, 16384).tokens <= 512
    assert choose_chunk({64: 30, 128: 1}, OLMOE, 16384).tokens in (64, 128), "of those that fit alone"


def test_nothing_to_read_is_no_reason_to_leave_the_default() -> None:
    choice = choose_chunk(dict.fromkeys(CANDIDATES, ALL), OLMOE, 4096)
    assert (choice.tokens, choice.read) == (DEFAULT_PREFILL_CHUNK, 0)
    assert "by 512" not in choice.summary()


@pytest.mark.parametrize("eager", [False, True])
def test_activations_of_a_long_context_follow_the_chunk(eager: bool) -> None:
    from transformers import OlmoeConfig

    config = OlmoeConfig(hidden_size=2048, num_attention_heads=16, intermediate_size=1024)
    few, many = (activation_bytes(config, 2, 16384, chunk, eager) for chunk in (128, 1024))
    if eager:  # scores of 16 heads, in the model's dtype and twice in float32
        assert many - few > 16 * (1024 - 128) * 16384 * 10
    assert many < 16 * 1024 * 16384 * 12, "never those of the whole prompt"
