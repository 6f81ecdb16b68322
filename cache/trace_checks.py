"""What makes a routing trace one: the columns, and every check before its numbers are believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS: dict[str, Any] = {
    "request": np.int32,
    "phase": np.uint8,
    "step": np.int32,
    "forward": np.int32,
    "layer": np.int16,
}
MOST_EXPERTS = 32766  # an int16 must hold one more, for "no expert"
_AGAIN = "record it again with --trace-out FILE"


class TraceError(ValueError):
    """A file that is not a routing trace; the message is one line with the file, what is wrong and the remedy."""


def checked_meta(path: Path, text: str) -> dict[str, Any]:
    """``meta`` as a dictionary whose ``model``, ``layers``, ``experts`` and ``top_k`` make sense."""
    try:
        meta = json.loads(text)
    except ValueError:
        meta = None
    if not isinstance(meta, dict):
        raise TraceError(f"{path}: meta is not a JSON object; {_AGAIN}")
    checked_meta_values(path, meta)
    return meta


def checked_meta_values(path: Path, meta: dict[str, Any]) -> None:
    """Raises TraceError."""
    for name, most in (("layers", 32767), ("experts", MOST_EXPERTS), ("top_k", MOST_EXPERTS)):
        value = meta.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise TraceError(f"{path}: meta needs '{name}', a whole number from 1 to {most}, not {value!r}; {_AGAIN}")
    if not isinstance(meta.get("model"), str):
        raise TraceError(f"{path}: meta needs 'model', a text; {_AGAIN}")


def checked_columns(path: Path, data: dict[str, NDArray[Any]], meta: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """All columns in their types, ``forward`` filled in where it is missing. Raises TraceError."""
    missing = {*COLUMNS, "ids", "weights"} - {"forward"} - data.keys()
    if missing:
        raise TraceError(f"{path}: not a routing trace (no {', '.join(sorted(missing))}); {_AGAIN}")
    rows = len(data["ids"]) if data["ids"].ndim else 0
    for name in (*COLUMNS, "ids", "weights"):
        if name in data:
            _check_shape(path, name, data[name], rows, meta["top_k"])
    columns = {name: _whole(path, name, data[name], dtype) for name, dtype in COLUMNS.items() if name in data}
    columns["ids"] = _whole(path, "ids", data["ids"], np.int16)
    columns["weights"] = _weights(path, data["weights"])
    if "forward" not in columns:
        request, step = columns["request"], columns["step"]
        changed = (np.diff(request, prepend=-1) != 0) | (np.diff(step, prepend=-1) != 0)
        columns["forward"] = np.cumsum(changed, dtype=np.int32) - 1
    _check_ranges(path, columns, meta)
    _check_order(path, columns)
    return columns


def _check_shape(path: Path, name: str, array: NDArray[Any], rows: int, top_k: int) -> None:
    if name in COLUMNS:
        if array.ndim != 1 or len(array) != rows:
            raise TraceError(
                f"{path}: {name} has the shape {array.shape}, but there are {rows} rows of ids "
                f"(columns of different length); {_AGAIN}"
            )
    elif array.ndim != 2 or array.shape != (rows, top_k):
        raise TraceError(
            f"{path}: {name} has the shape {array.shape}, but {rows} rows with top_k {top_k} make ({rows}, {top_k}); "
            f"{_AGAIN}"
        )


def _whole(path: Path, name: str, array: NDArray[Any], dtype: Any) -> NDArray[Any]:
    if array.dtype.kind not in "iu":
        raise TraceError(f"{path}: {name} is of type {array.dtype}, not whole numbers; {_AGAIN}")
    limits = np.iinfo(dtype)
    if len(array) and (int(array.min()) < 0 or int(array.max()) > limits.max):
        bad = array.min() if int(array.min()) < 0 else array.max()
        raise TraceError(f"{path}: {name} is out of range ({bad} is not between 0 and {limits.max}); {_AGAIN}")
    return array.astype(dtype, copy=False)


def _weights(path: Path, array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind != "f":
        raise TraceError(f"{path}: weights are of type {array.dtype}, not floating-point numbers; {_AGAIN}")
    with np.errstate(over="ignore"):
        weights = array.astype(np.float16, copy=False)
    bad = ~np.isfinite(weights).all(axis=1)
    if bad.any():
        row = int(bad.argmax())
        raise TraceError(
            f"{path}: the weights of row {row} are not all finite numbers ({array[row].tolist()}); {_AGAIN}, or "
            "mend it with 'run-local trace convert IN OUT --sort'"
        )
    return weights


def _check_ranges(path: Path, columns: dict[str, NDArray[Any]], meta: dict[str, Any]) -> None:
    experts, layers = meta["experts"], meta["layers"]
    bad = (columns["ids"] > experts).any(axis=1)
    if bad.any():
        row = int(bad.argmax())
        raise TraceError(
            f"{path}: an expert id of row {row} is out of range ({columns['ids'][row].max()}, but meta says "
            f"{experts} experts); correct 'experts' in meta, or {_AGAIN}"
        )
    if len(columns["phase"]) and columns["phase"].max() > 1:
        raise TraceError(f"{path}: phase must be 0 (prefill) or 1 (decode), not {columns['phase'].max()}; {_AGAIN}")
    found = len(np.unique(columns["layer"]))
    if found > layers:
        raise TraceError(
            f"{path}: there are rows of {found} layers, but meta says {layers}; correct 'layers' in meta, or {_AGAIN}"
        )


def _check_order(path: Path, columns: dict[str, NDArray[Any]]) -> None:
    """Execution order: an event's rows stand together, and in every layer passes and a request's tokens go on.

    Replay takes the rows as they come; sorted another way they would give figures that mean nothing.
    """
    forward, layer, request, step = (columns[name].astype(np.int64) for name in ("forward", "layer", "request", "step"))
    if not len(forward):
        return
    remedy = "put the rows into the order in which they ran ('run-local trace convert IN OUT --sort' does)"
    by_layer = np.argsort(layer, kind="stable")
    passes = forward[by_layer]
    back = (np.diff(passes) < 0) & (np.diff(layer[by_layer]) == 0)
    if back.any():
        at = by_layer[1:][back].min()
        raise TraceError(
            f"{path}: the rows are not in execution order (row {at}: forward pass {forward[at]} of layer {layer[at]} "
            f"comes after a later one); {remedy}"
        )
    event = forward * (int(layer.max()) + 1) + layer
    starts = np.concatenate([[True], np.diff(event) != 0])
    runs = event[starts]
    if len(np.unique(runs)) != len(runs):
        order = np.argsort(runs, kind="stable")
        again = order[1:][np.diff(runs[order]) == 0].min()
        at = int(np.flatnonzero(starts)[again])
        raise TraceError(
            f"{path}: the rows are not in execution order (row {at}: forward pass {forward[at]}, layer {layer[at]} "
            f"was there before and had ended); {remedy}"
        )
    by_request = np.lexsort((np.arange(len(step)), layer, request))
    same = (np.diff(request[by_request]) == 0) & (np.diff(layer[by_request]) == 0)
    back = same & (np.diff(step[by_request]) < 0)
    if back.any():
        at = by_request[1:][back].min()
        raise TraceError(
            f"{path}: the rows are not in execution order (row {at}: step {step[at]} of request {request[at]} in layer "
            f"{layer[at]} comes after a later one); {remedy}"
        )
