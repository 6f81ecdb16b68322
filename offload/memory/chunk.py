"""How many tokens of a prompt run at once: a pure function of sizes and slots. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from offload.config import DEFAULT_MAX_NEW_TOKENS, DEFAULT_PREFILL_CHUNK, format_size
from offload.memory.rows import GainCurve

CANDIDATES = tuple(DEFAULT_PREFILL_CHUNK * 2**power // 8 for power in range(9))
"""64 to 16384 tokens."""
_GOOD_ENOUGH = 1.05


@dataclass(frozen=True, slots=True)
class ChunkChoice:
    """``tokens`` run at once, chosen for prompts of ``prompt`` tokens: all chunks of one read ``read`` bytes, and
    ``default_read`` in chunks of the default size (None if that does not fit).
    """

    tokens: int
    prompt: int
    read: int
    default_read: int | None

    def summary(self) -> str:
        line = (
            f"prompts run {self.tokens} tokens at a time (--prefill-chunk auto): {self.prompt} tokens read about "
            f"{format_size(self.read)} of experts"
        )
        if self.tokens != DEFAULT_PREFILL_CHUNK and self.default_read is not None:
            line += f", by {DEFAULT_PREFILL_CHUNK} it were {format_size(self.default_read)}"
        return line


def choose_chunk(slots: Mapping[int, int], work: GainCurve, context: int) -> ChunkChoice:
    """Of the chunks in ``slots``, which tells what each leaves for experts beside its activations, the one with which
    a request that fills ``context`` reads the fewest bytes.

    A larger chunk lets more tokens share what is read, and takes slots from all that follows, so the request has an
    answer too: a quarter of its tokens, at most as many as are answered by default. Experts count as equally likely.
    Of those within 5 % of the best it is the one nearest to the default, so that nothing is given up for nothing.
    """
    answer = min(DEFAULT_MAX_NEW_TOKENS, context // 4)
    prompt = context - answer

    def in_prompt(chunk: int) -> float:
        return -(-prompt // chunk) * work.layers * work.distinct(chunk) * _missing(work, slots[chunk])

    def in_all(chunk: int) -> float:
        return in_prompt(chunk) + answer * work.layers * work.top_k * _missing(work, slots[chunk])

    least = min(map(in_all, slots))
    good = [chunk for chunk in slots if in_all(chunk) <= _GOOD_ENOUGH * least]
    chunk = min(good, key=lambda tokens: abs(math.log2(tokens / DEFAULT_PREFILL_CHUNK)))
    default = round(in_prompt(DEFAULT_PREFILL_CHUNK)) if DEFAULT_PREFILL_CHUNK in slots else None
    return ChunkChoice(chunk, prompt, round(in_prompt(chunk)), default)


def _missing(work: GainCurve, slots: int) -> float:
    """Bytes of a record, times the share of the experts that has no slot."""
    return work.record_bytes * max(0.0, 1 - slots / (work.layers * work.experts))
