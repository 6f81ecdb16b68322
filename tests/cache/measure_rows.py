"""What rows that decode together read, by replay: ``python -m tests.cache.measure_rows TRACE.npz [ROWS ...]``.

The decoded tokens of the trace's requests run in step, so many requests at a time, as long as the shortest lasts. For
each share of the experts that has slots it tells the records read for a token and layer, by the rule that events of
several tokens stream and, beside it, admitted like those of a single token.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from cache.events import trace_events
from cache.simulate import ReplaySettings, replay_events
from cache.trace import DECODE, Trace, load_trace
from cache.trace_checks import COLUMNS

SHARES = (0.25, 0.47, 0.7)


def in_step(trace: Trace, rows: int) -> Trace:
    """Passes with one decoded token of each of ``rows`` requests."""
    decoded = trace.rows(trace.phase == DECODE)
    requests = np.unique(decoded.request)
    parts: list[Trace] = []
    passes = 0
    for first in range(0, len(requests) - rows + 1, rows):
        part = decoded.rows(np.isin(decoded.request, requests[first : first + rows]))
        place = np.zeros(len(part), np.int64)  # of each token in its answer
        for request in np.unique(part.request):
            own = part.request == request
            place[own] = np.unique(part.step[own], return_inverse=True)[1]
        shortest = min(place[part.request == request].max() for request in np.unique(part.request))
        part, place = part.rows(place <= shortest), place[place <= shortest]
        order = np.lexsort((part.request, part.layer, place))
        part = part.rows(order)
        parts.append(replace(part, forward=(place[order] + passes).astype(np.int32)))
        passes += int(shortest) + 1
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in (*COLUMNS, "ids", "weights")}
    return Trace(**columns, meta=dict(trace.meta))


def main(arguments: list[str]) -> None:
    trace = load_trace(Path(arguments[0]))
    layers = len(np.unique(trace.layer))
    print("rows  distinct  slots a layer  streaming  as one token")
    for rows in map(int, arguments[1:] or ("1", "2", "4", "8", "16")):
        events = trace_events(in_step(trace, rows))
        tokens = int(events.tokens.sum())
        for share in SHARES:
            slots = int(share * trace.experts * layers)
            streams, plain = (
                replay_events(each, ReplaySettings(slots=slots)).total.loads / tokens
                for each in (events, replace(events, recent={}))
            )
            distinct = np.diff(events.starts).mean()
            print(f"{rows:4}  {distinct:8.1f}  {slots / layers:13.1f}  {streams:9.3f}  {plain:12.3f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
