"""Which tokens of a forward pass tell the cache what is used next: one rule for the runtime and for the replay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from cache.trace import DECODE, Trace

SEED_TOKENS = 8
"""So many last tokens of a prompt tell the expert cache what decoding is likely to use."""


def recent_tokens(parts: Iterable[tuple[int, bool]]) -> list[list[int]]:
    """Groups of tokens, by their place in the pass: the most recent use, told one group after the other.

    ``parts`` are the requests that share the pass, in the order of their tokens: how many tokens each has there, and
    whether it ends with it: its next token is chosen from the pass. A pass of one request that ends has a group for
    each of its last :data:`SEED_TOKENS` tokens; a pass of several has one group, with the last token of each that
    ends. Where nothing ends there are none.
    """
    places: list[int] = []
    count = start = 0
    for tokens, ends in parts:
        count, start = count + 1, start + tokens
        if ends:
            places.append(start - 1)
    if count == 1 and places:
        return [[place] for place in range(max(0, start - SEED_TOKENS), start)]
    return [places] if places else []


def choosing_rows(trace: Trace) -> NDArray[np.bool_]:
    """The rows [N] of tokens from which a next one was chosen: all decoded ones, and the last of each prompt.

    A prompt ends where its request begins to decode, or with the last of its tokens if it never does. (So a prompt that
    was broken off seems to end with the last chunk that ran.)
    """
    decode = trace.phase == DECODE
    _, request = np.unique(trace.request, return_inverse=True)
    count = int(request.max(initial=-1)) + 1
    began = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(began, request[decode], trace.step[decode])
    prompt = ~decode & (trace.step < began[request])
    end = np.full(count, -1, np.int64)
    np.maximum.at(end, request[prompt], trace.step[prompt])
    chosen: NDArray[np.bool_] = decode | (prompt & (trace.step == end[request]))
    return chosen


def recent_rows(requests: Sequence[int], choosing: Sequence[bool]) -> list[list[int]]:
    """:func:`recent_tokens` of an event whose rows have these ``requests`` and :func:`choosing_rows`."""
    rows = zip(requests, choosing, strict=True)
    parts = (list(part) for _, part in groupby(rows, key=lambda row: row[0]))
    return recent_tokens((len(part), part[-1][1]) for part in parts)
