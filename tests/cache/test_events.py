"""A trace cut into events: one for each forward pass and layer, its experts by rank."""

from __future__ import annotations

import numpy as np

from cache.events import by_rank, trace_events
from cache.trace import DECODE, PREFILL, Trace


def trace(rows: list[tuple[int, int, int, int, list[int]]], experts: int = 8) -> Trace:
    """Rows of (request, step, forward, layer, ids)."""
    request, step, forward, layer, ids = (list(column) for column in zip(*rows, strict=True)) if rows else ([],) * 5
    return Trace(
        request=np.array(request, np.int32),
        phase=np.array([PREFILL if pass_ == 0 else DECODE for pass_ in forward], np.uint8),
        step=np.array(step, np.int32),
        forward=np.array(forward, np.int32),
        layer=np.array(layer, np.int16),
        ids=np.array(ids, np.int16).reshape(len(rows), -1 if rows else 2),
        weights=np.full((len(rows), len(ids[0]) if rows else 2), 0.5, np.float16),
        meta={"experts": experts},
    )


def test_rows_that_ran_together_are_one_event() -> None:
    events = trace_events(
        trace(
            [
                (0, 0, 0, 3, [5, 1]),
                (0, 1, 0, 3, [1, 2]),
                (0, 0, 0, 4, [7, 6]),
                (0, 1, 0, 4, [7, 6]),
                (0, 2, 1, 3, [0, 5]),
            ]
        )
    )
    assert events.sets() == [[5, 1, 2], [7, 6], [0, 5]], "all first choices, then the second ones"
    assert events.layer.tolist() == [3, 4, 3]
    assert events.tokens.tolist() == [2, 2, 1]
    assert events.decode.tolist() == [False, False, True]
    assert events.weights.tolist() == [0.5, 1.0, 0.5, 1.0, 1.0, 0.5, 0.5]
    assert events.layers() == [3, 4]
    assert events.event_of_access().tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_events_keep_the_order_in_which_they_ran() -> None:
    rows = [(1, 0, 9, 1, [1, 2]), (0, 0, 3, 1, [3, 4]), (1, 0, 9, 0, [5, 6])]
    assert trace_events(trace(rows)).sets() == [[1, 2], [3, 4], [5, 6]]


def test_ids_that_name_no_expert_are_left_out() -> None:
    events = trace_events(trace([(0, 0, 0, 0, [8, 3]), (0, 0, 0, 1, [-1, 8])]))
    assert events.sets() == [[3], []]


def test_an_empty_trace_has_no_events() -> None:
    events = trace_events(trace([]))
    assert (len(events), events.sets(), events.layers()) == (0, [], [])


def test_the_runtime_and_the_trace_agree_on_the_order() -> None:
    ids = np.random.default_rng(0).integers(0, 10, (50, 3))
    events = trace_events(trace([(0, step, 0, 0, row) for step, row in enumerate(ids.tolist())]))
    assert events.sets() == [by_rank(ids.tolist(), 8)]


def test_a_part_of_the_events() -> None:
    events = trace_events(trace([(0, 0, 0, 0, [1, 2]), (1, 0, 1, 0, [3, 4]), (1, 1, 2, 0, [5, 6])]))
    part = events.where(events.request == 1)
    assert part.sets() == [[3, 4], [5, 6]]
    assert part.starts.tolist() == [0, 2, 4]
    assert part.weights.tolist() == [0.5] * 4
