"""How often experts were used: what a static order is made of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cache.events import Events, trace_events
from cache.keys import ExpertKey
from cache.trace import TraceError, load_trace


class CountsError(ValueError):
    """A file that holds no counts; the message is one line."""


def count_uses(events: Events) -> dict[ExpertKey, float]:
    """The number of events that used each expert; those never used are not in it."""
    width = int(events.experts.max(initial=0)) + 1
    code = events.layer[events.event_of_access()].astype(np.int64) * width + events.experts
    return {
        ExpertKey(*divmod(key, width)): float(uses)
        for key, uses in zip(*map(np.ndarray.tolist, np.unique(code, return_counts=True)), strict=True)
    }


def load_counts(path: Path) -> dict[ExpertKey, float]:
    """The counts in a trace (``.npz``), or in a JSON object ``{"LAYER": [uses of expert 0, of expert 1, ...]}``.

    Raises CountsError.
    """
    if path.suffix == ".npz":
        try:
            return count_uses(trace_events(load_trace(path)))
        except TraceError as error:
            raise CountsError(str(error)) from error
    try:
        data = json.loads(path.read_text("utf-8"))
        return {
            ExpertKey(int(layer), expert): _uses(value)
            for layer, row in data.items()
            for expert, value in enumerate(row)
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CountsError(f"{path}: neither a trace nor a JSON object of counts by layer ({error})") from error


def save_counts(path: Path, uses: Mapping[ExpertKey, float]) -> None:
    """Write what :func:`load_counts` reads. Raises OSError."""
    width = max((key.expert for key in uses), default=-1) + 1
    rows = {
        layer: [uses.get(ExpertKey(layer, expert), 0.0) for expert in range(width)]
        for layer in sorted({key.layer for key in uses})
    }
    path.write_text(json.dumps(rows), "utf-8")


def _uses(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is not a number of uses")
    return float(value)
