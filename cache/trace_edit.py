"""Traces put together, taken apart by request, and put in order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.trace import Trace, read_arrays
from cache.trace_checks import COLUMNS, TraceError, checked_columns, checked_meta


def merge(traces: Sequence[Trace], names: Sequence[str]) -> Trace:
    """One trace of several, one after the other; requests and forward passes are numbered on.

    Raises TraceError, naming the trace by ``names``, for traces of different models.
    """
    first = traces[0]
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in (*COLUMNS, "ids", "weights")}
    requests = passes = 0
    for trace, name in zip(traces, names, strict=True):
        for what in ("experts", "top_k", "layers"):
            if trace.meta[what] != first.meta[what]:
                raise TraceError(
                    f"{name}: {what} is {trace.meta[what]}, but {first.meta[what]} in {names[0]}; traces of different "
                    "models cannot be merged"
                )
        for column in columns:
            columns[column].append(getattr(trace, column))
        columns["request"][-1] = columns["request"][-1] + np.int32(requests)
        columns["forward"][-1] = columns["forward"][-1] + np.int32(passes)
        if len(trace):
            requests, passes = int(columns["request"][-1].max()) + 1, int(columns["forward"][-1].max()) + 1
    models = dict.fromkeys(str(trace.meta["model"]) for trace in traces)
    return Trace(
        **{name: np.concatenate(parts) for name, parts in columns.items()},
        meta=dict(first.meta) | {"model": " + ".join(models)},
    )


def requests_of(trace: Trace) -> list[int]:
    """The requests, in the order of their first rows."""
    numbers, first = np.unique(trace.request, return_index=True)
    return [int(number) for number in numbers[np.argsort(first)]]


def select(trace: Trace, requests: Sequence[int]) -> Trace:
    """Only the rows of some requests. A pass that others shared keeps the rows that are left."""
    return trace.rows(np.isin(trace.request, requests))


def folds(requests: Sequence[int], count: int) -> list[list[int]]:
    """The requests dealt into ``count`` parts, as even as can be, in turns: early ones and late ones in each."""
    return [list(requests[number::count]) for number in range(min(count, len(requests)))]


def mend(path: Path) -> Trace:
    """Load an ``.npz`` whose rows are not in execution order, or that has weights that are no numbers (they become 0).

    Raises TraceError for whatever else is wrong with it.
    """
    data, text = read_arrays(path)
    meta = checked_meta(path, text)
    if "weights" in data and data["weights"].dtype.kind == "f":
        data["weights"] = np.nan_to_num(data["weights"], nan=0.0, posinf=0.0, neginf=0.0)
    keys = [data[name] for name in ("step", "layer", "forward") if name in data]
    if "forward" not in data:
        keys = [data[name] for name in ("layer", "step", "request") if name in data]
    if len({len(column) for column in data.values() if column.ndim}) == 1 and all(key.ndim == 1 for key in keys):
        order = np.lexsort(keys)
        data = {name: column[order] for name, column in data.items()}
    return Trace(**checked_columns(path, data, meta), meta=meta)
