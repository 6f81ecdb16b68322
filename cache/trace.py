"""Routing traces: which experts every token chose, in the form that replay and tuning read.

An ``.npz`` of equally long arrays in execution order, one row per token of each (request, step, layer):
``request int32, phase uint8 (0 prefill, 1 decode), step int32, forward int32, layer int16, ids int16[N, k],
weights float16[N, k]``, and ``meta``, a JSON string with at least ``model, layers, experts, top_k``. Rows with the same
``forward`` and ``layer`` ran together and form one event.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PREFILL, DECODE = 0, 1
_COLUMNS: dict[str, Any] = {
    "request": np.int32,
    "phase": np.uint8,
    "step": np.int32,
    "forward": np.int32,
    "layer": np.int16,
}


class TraceError(ValueError):
    """A file that is not a routing trace; the message names the file and what is wrong."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A loaded trace. All arrays have N rows; ``ids`` and ``weights`` are [N, top_k]."""

    request: NDArray[np.int32]
    phase: NDArray[np.uint8]
    step: NDArray[np.int32]
    forward: NDArray[np.int32]
    layer: NDArray[np.int16]
    ids: NDArray[np.int16]
    weights: NDArray[np.float16]
    meta: dict[str, Any]


class TraceRecorder:
    """Collects routing as it happens. :meth:`record` keeps references only; the work is done in :meth:`save`."""

    def __init__(self, model: str, layers: int, experts: int, top_k: int) -> None:
        self._top_k = top_k
        self._meta = {"model": model, "layers": layers, "experts": experts, "top_k": top_k}
        self._rows: list[tuple[int, int, int, int, int, NDArray[Any], NDArray[Any]]] = []

    def record(
        self,
        *,
        request: int,
        phase: int,
        step: int,
        forward: int,
        layer: int,
        ids: NDArray[Any],
        weights: NDArray[Any],
    ) -> None:
        """One event: ``ids`` and ``weights`` are [T, k] for the T tokens of this forward pass, oldest first.

        ``step`` is the position of the first of them in its request; the tokens are numbered on from there. The
        arrays must not be changed afterwards.
        """
        self._rows.append((request, phase, step, forward, layer, ids, weights))

    def __len__(self) -> int:
        """The rows so far, one for each token of each event."""
        return sum(len(row[5]) for row in self._rows)

    def save(self, path: Path) -> None:
        """Write the trace, atomically. Raises OSError, leaving no partial file behind."""
        counts = [len(row[5]) for row in self._rows]
        columns = {
            name: np.repeat(np.array([row[i] for row in self._rows], dtype=dtype), counts)
            for i, (name, dtype) in enumerate(_COLUMNS.items())
        }
        if counts:
            columns["step"] += np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
        empty = np.zeros((0, self._top_k))
        ids = np.concatenate([row[5] for row in self._rows] or [empty]).astype(np.int16)
        weights = np.concatenate([row[6] for row in self._rows] or [empty]).astype(np.float16)
        partial = path.with_name(f".{path.name}.partial")
        try:
            with open(partial, "wb") as file:
                arrays: dict[str, Any] = columns | {"ids": ids, "weights": weights}
                np.savez_compressed(file, meta=np.array(json.dumps(self._meta)), **arrays)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def load_trace(path: Path) -> Trace:
    """Read a trace. ``forward`` may be missing: then every (request, step) is a forward pass of its own.

    Raises TraceError if the file is not one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise TraceError(f"{path}: not a routing trace ({error})") from error
    missing = {"request", "phase", "step", "layer", "ids", "weights", "meta"} - data.keys()
    if missing:
        raise TraceError(f"{path}: not a routing trace (no {', '.join(sorted(missing))})")
    meta = json.loads(str(data.pop("meta")))
    if "forward" not in data:
        changed = (np.diff(data["request"], prepend=-1) != 0) | (np.diff(data["step"], prepend=-1) != 0)
        data["forward"] = np.cumsum(changed, dtype=np.int32) - 1
    rows = len(data["ids"])
    if any(len(column) != rows for column in data.values()):
        raise TraceError(f"{path}: not a routing trace (columns of different length)")
    return Trace(**{name: data[name] for name in (*_COLUMNS, "ids", "weights")}, meta=meta)
