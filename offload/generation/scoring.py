"""The logits of a text's positions, piece by piece, so that a large vocabulary takes little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

_LOGITS_BYTES = 32 * 2**20
"""Most logits that one forward pass makes. The plan counts those of one position: these live on its margin, and on what
a pass of fewer tokens leaves of its activations."""
_PIECE_BYTES = 2 * 2**20


def score_chunk(itemsize: int, vocabulary: int, prefill_chunk: int) -> int:
    """How many tokens one forward pass takes, with logits of ``itemsize`` bytes each."""
    return min(max(1, _LOGITS_BYTES // (itemsize * vocabulary)), prefill_chunk)


def score_pieces(
    forward: Callable[[list[int], bool], torch.Tensor], ids: list[int], chunk: int, vocabulary: int
) -> Iterator[torch.Tensor]:
    """The logits [n, V] of all ``ids`` in order, float32 on the CPU.

    ``forward`` gives those of the next tokens, and is told whether they are the last.
    """
    rows = max(1, _PIECE_BYTES // (4 * vocabulary))
    for start in range(0, len(ids), chunk):
        logits = forward(ids[start : start + chunk], start + chunk >= len(ids))
        for piece in logits.split(rows):
            yield piece.to("cpu", torch.float32, copy=True)  # a view would keep all of them
        del logits, piece  # before the next pass makes its own
