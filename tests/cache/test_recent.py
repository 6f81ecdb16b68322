"""Which tokens tell the cache what comes next: the same from a pass and from the rows of its trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cache.events import trace_events
from cache.recent import SEED_TOKENS, choosing_rows, recent_tokens
from cache.trace import DECODE, PREFILL, Trace


def trace(rows: list[tuple[int, int, int, int, list[int]]]) -> Trace:
    """Rows of one layer: (request, phase, step, forward, ids)."""
    request, phase, step, forward, ids = (list(column) for column in zip(*rows, strict=True))
    return Trace(
        request=np.array(request, np.int32),
        phase=np.array(phase, np.uint8),
        step=np.array(step, np.int32),
        forward=np.array(forward, np.int32),
        layer=np.zeros(len(rows), np.int16),
        ids=np.array(ids, np.int16),
        weights=np.zeros((len(rows), 2), np.float16),
        meta={"experts": 8, "top_k": 2},
    )


def test_the_last_tokens_of_a_prompt_are_told_one_by_one() -> None:
    assert recent_tokens([(3, True)]) == [[0], [1], [2]]
    assert recent_tokens([(20, True)]) == [[place] for place in range(20 - SEED_TOKENS, 20)]
    assert recent_tokens([(20, False)]) == []


def test_rows_tell_of_their_last_tokens_together() -> None:
    assert recent_tokens([(1, True), (1, True), (4, False), (3, True)]) == [[0, 1, 8]]
    assert recent_tokens([(2, False), (4, False)]) == []


def test_a_prompt_ends_before_the_first_decoded_token_or_with_the_request() -> None:
    chunks = [(0, PREFILL, step, step // 2, [1, 2]) for step in range(4)]
    one_token = [(1, PREFILL, step, 9, [1, 2]) for step in (6, 7)]  # the first six were in the KV cache
    rows = trace([*chunks, (0, DECODE, 4, 2, [3, 4]), *one_token])
    assert choosing_rows(rows).tolist() == [False, False, False, True, True, False, True]
    assert trace_events(rows).recent == {0: [], 1: [[1, 2], [1, 2]], 3: [[1, 2], [1, 2]]}
    assert not len(choosing_rows(rows.rows(np.zeros(len(rows), bool))))


def test_the_rows_of_a_shared_pass() -> None:
    rows = [
        (0, PREFILL, 0, 0, [5, 5]),
        (0, DECODE, 1, 1, [1, 2]),
        (1, PREFILL, 0, 1, [3, 4]),
        (1, PREFILL, 1, 1, [6, 1]),
        (2, PREFILL, 0, 1, [7, 7]),
        (0, DECODE, 2, 2, [2, 3]),
        (1, DECODE, 2, 2, [4, 3]),
        (2, PREFILL, 1, 3, [0, 7]),
        (2, PREFILL, 2, 3, [8, 0]),
    ]
    events = trace_events(trace(rows))
    assert events.recent == {1: [[1, 6, 2]], 2: [[2, 4, 3]], 3: [[0, 7], [0]]}
    assert events.decode.tolist() == [False, False, True, False], "a pass decodes if all of its rows do"
    later = events.where(np.array([False, False, True, True]))
    assert later.recent == {0: [[2, 4, 3]], 1: [[0, 7], [0]]}
    assert replace(later, recent={}).sets() == later.sets()
