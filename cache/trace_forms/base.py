"""What a form of a trace is, and how rows in any order become a trace."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cache.trace import DECODE, PREFILL, Trace
from cache.trace_checks import TraceError, checked_columns, checked_meta_values

PHASES = {"prefill": PREFILL, "decode": DECODE, "0": PREFILL, "1": DECODE, "prompt": PREFILL}


class FormError(ValueError):
    """A line that does not hold to its form; the reader adds the file and the line's number."""


@dataclass(slots=True)
class Rows:
    """One entry a token and layer. ``step`` and ``phase`` may be None, ``forward`` too, but then everywhere.

    ``meta`` holds what the file says of itself: ``model``, ``experts``, ``top_k``, ``expert_bytes``.
    """

    request: list[str] = field(default_factory=list)
    phase: list[int | None] = field(default_factory=list)
    step: list[int | None] = field(default_factory=list)
    forward: list[int | None] = field(default_factory=list)
    layer: list[int] = field(default_factory=list)
    ids: list[tuple[int, ...]] = field(default_factory=list)
    weights: list[tuple[float, ...]] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    def add(
        self,
        layer: int,
        ids: Sequence[int],
        weights: Sequence[float] = (),
        *,
        request: str = "0",
        phase: int | None = None,
        step: int | None = None,
        forward: int | None = None,
    ) -> None:
        """Raises FormError for ids that are none, or weights of another number."""
        if not ids:
            raise FormError("no experts")
        if weights and len(weights) != len(ids):
            raise FormError(f"{len(ids)} experts but {len(weights)} weights")
        self.request.append(request)
        self.phase.append(phase)
        self.step.append(step)
        self.forward.append(forward)
        self.layer.append(layer)
        self.ids.append(tuple(ids))
        self.weights.append(tuple(weights) or (0.0,) * len(ids))


class Form(ABC):
    """A way to write routing down that some program has."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def matches(self, start: str) -> bool:
        """Whether a file that begins with ``start`` (some thousand characters) is of this form."""

    @abstractmethod
    def read(self, lines: Iterable[str], rows: Rows) -> None:
        """Take in the lines. A generator of numbered lines: FormError is blamed on the last one that was drawn."""


def numbers_in(text: str) -> list[int]:
    """The whole numbers of ``[3, 17]``, ``3 17`` or ``3;17``. Raises FormError for anything else."""
    words = re.sub(r"[\[\](),;|]", " ", text).split()
    try:
        return [int(word) for word in words]
    except ValueError:
        raise FormError(f"'{text[:40]}' is not a list of whole numbers") from None


def floats_in(text: str) -> list[float]:
    words = re.sub(r"[\[\](),;|]", " ", text).split()
    try:
        return [float(word) for word in words]
    except ValueError:
        raise FormError(f"'{text[:40]}' is not a list of numbers") from None


def whole_number(value: object, what: str) -> int:
    try:
        number = int(str(value))
    except ValueError:
        raise FormError(f"{what} '{str(value)[:40]}' is not a whole number") from None
    return number


def phase_number(value: object) -> int:
    phase = PHASES.get(str(value).strip().lower())
    if phase is None:
        raise FormError(f"phase '{str(value)[:40]}' is not one of {', '.join(PHASES)}")
    return phase


def build(path: Path, rows: Rows, *, model: str | None, experts: int | None, phase: int) -> Trace:
    """The trace of ``rows``, in execution order: one request after the other, each prompt in one pass.

    Rows that say their forward pass keep their order instead. ``phase`` is for rows that name none. Raises TraceError.
    """
    if not rows.layer:
        raise TraceError(f"{path}: there are no rows; is this the right file, and the right --form?")
    width = max(map(len, rows.ids))
    most = max(max(ids) for ids in rows.ids)
    count = experts or rows.meta.get("experts") or most + 1
    meta: dict[str, Any] = {
        "model": model or str(rows.meta.get("model") or path.stem),
        "layers": len(set(rows.layer)),
        "experts": count,
        "top_k": width,
        "source": path.name,
    }
    if rows.meta.get("expert_bytes"):
        meta["expert_bytes"] = rows.meta["expert_bytes"]
    checked_meta_values(path, meta)
    ids = np.full((len(rows.ids), width), count, np.int64)
    weights = np.zeros((len(rows.ids), width))
    for row, (chosen, shares) in enumerate(zip(rows.ids, rows.weights, strict=True)):
        ids[row, : len(chosen)] = chosen
        weights[row, : len(shares)] = shares
    names = {name: number for number, name in enumerate(dict.fromkeys(rows.request))}
    columns: dict[str, NDArray[Any]] = {
        "request": np.array([names[name] for name in rows.request]),
        "phase": np.array([phase if value is None else value for value in rows.phase]),
        "layer": np.array(rows.layer),
        "ids": np.where((ids < 0), count, ids),
        "weights": np.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0),
    }
    columns["step"] = _steps(columns["request"], columns["layer"], rows.step)
    if all(value is not None for value in rows.forward):
        columns["forward"] = np.array(rows.forward)
    else:
        columns = _in_order(columns)
    return Trace(**checked_columns(path, columns, meta), meta=meta)


def _steps(request: NDArray[Any], layer: NDArray[Any], given: list[int | None]) -> NDArray[Any]:
    """The steps of the file; where a request has none, or they start over (indices in a batch), they are counted."""
    order = np.lexsort((np.arange(len(layer)), layer, request))
    new = (np.diff(request[order], prepend=-1) != 0) | (np.diff(layer[order], prepend=-1) != 0)
    starts = np.flatnonzero(new)
    counted = np.empty(len(layer), np.int64)
    counted[order] = np.arange(len(layer)) - np.repeat(starts, np.diff([*starts, len(layer)]))
    steps = np.array([-1 if value is None else value for value in given])
    sorted_steps, sorted_request = steps[order], request[order]
    over = (np.diff(sorted_steps, prepend=-1) <= 0) & ~new
    restarted = np.unique(sorted_request[over | (sorted_steps < 0)])
    return np.where(np.isin(request, restarted), counted, steps)


def _in_order(columns: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """All columns in execution order, with ``forward``: each stretch of a prompt is a pass, and each decoded token."""
    request, step, decode = columns["request"], columns["step"], columns["phase"] == DECODE
    token = request * (int(step.max()) + 2) + step
    decoded = np.unique(token[decode])
    # a prompt row comes after the decoded tokens before it: their number tells one stretch from the next
    stretch = 2 * np.searchsorted(decoded, token) + decode
    order = np.lexsort((step, columns["layer"], stretch, request))
    columns = {name: column[order] for name, column in columns.items()}
    stretch, request = stretch[order], columns["request"]
    changed = (np.diff(stretch, prepend=-1) != 0) | (np.diff(request, prepend=-1) != 0)
    columns["forward"] = np.cumsum(changed) - 1
    return columns
