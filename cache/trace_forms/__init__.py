"""Routing as other programs write it down: read into a trace, and a trace written as text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cache.trace import DECODE, PREFILL, Trace, load_trace, save_trace
from cache.trace_checks import COLUMNS, TraceError
from cache.trace_forms.base import Form, FormError, Rows, build
from cache.trace_forms.colibri import Colibri
from cache.trace_forms.records import Records
from cache.trace_forms.responses import Responses
from cache.trace_forms.table import Table

FORMS: dict[str, Form] = {form.name: form for form in (Table(), Responses(), Records(), Colibri())}
SUFFIXES = (".npz", ".csv", ".jsonl")

__all__ = ["FORMS", "SUFFIXES", "Form", "TraceError", "read_trace", "write_trace"]

_START = 1 << 16


def read_trace(
    path: Path,
    form: str | None = None,
    *,
    model: str | None = None,
    experts: int | None = None,
    phase: int = DECODE,
) -> Trace:
    """A trace from a file of any known form, which its beginning tells if ``form`` does not.

    ``model`` and ``experts`` replace what the file says, ``phase`` is for rows that name none. Raises TraceError.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(_START)
    except FileNotFoundError:
        raise TraceError(f"{path}: there is no such file") from None
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror})") from error
    if form is None and start[:2] == b"PK":
        return load_trace(path)
    if form is not None and form not in FORMS:
        raise TraceError(f"there is no form '{form}'; there are {', '.join(FORMS)}")
    text = start.decode("utf-8", "replace").removeprefix("\ufeff")
    if not text.strip():
        raise TraceError(f"{path}: the file is empty")
    reader = FORMS[form] if form else next((one for one in FORMS.values() if one.matches(text)), None)
    if reader is None:
        raise TraceError(
            f"{path}: its beginning is of no known form; name one with --form ({', '.join(FORMS)}), or see the forms "
            "in docs/tuning.md"
        )
    rows = Rows()
    lines = _Lines(path)
    try:
        reader.read(lines, rows)
    except FormError as error:
        raise TraceError(
            f"{path}, line {lines.number}: {error} (read as {reader.name}; --form names another)"
        ) from None
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}, line {lines.number + 1}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror})") from error
    return build(path, rows, model=model, experts=experts, phase=phase)


class _Lines:
    """The lines of a file, and the number of the last one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        with open(self._path, encoding="utf-8-sig", newline="") as file:
            for line in file:
                self.number += 1
                yield line


def write_trace(path: Path, trace: Trace) -> None:
    """Write ``trace`` in the form that the name's ending says, which must be one of :data:`SUFFIXES`.

    Raises OSError, leaving no partial file behind.
    """
    if path.suffix == ".npz":
        save_trace(path, trace)
        return
    lines = _table_lines(trace) if path.suffix == ".csv" else _record_lines(trace)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(lines)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _table_lines(trace: Trace) -> Iterator[str]:
    model = "-".join(str(trace.meta["model"]).split())
    yield f"# model={model} experts={trace.experts} top_k={trace.top_k}\n"
    if size := trace.meta.get("expert_bytes"):
        yield f"# expert_bytes={size}\n"
    yield "request,phase,step,forward,layer,experts,weights\n"
    for numbers, ids, weights in _text_rows(trace):
        request, phase, step, forward, layer = numbers
        experts, shares = " ".join(map(str, ids)), " ".join(f"{weight:.4g}" for weight in weights)
        yield f"{request},{_PHASE[phase]},{step},{forward},{layer},{experts},{shares}\n"


def _record_lines(trace: Trace) -> Iterator[str]:
    yield json.dumps({"type": "meta"} | trace.meta) + "\n"
    for numbers, ids, weights in _text_rows(trace):
        row: dict[str, object] = dict(zip(COLUMNS, numbers, strict=True))
        row |= {"phase": _PHASE[numbers[1]], "ids": ids, "weights": [round(weight, 5) for weight in weights]}
        yield json.dumps(row) + "\n"


_PHASE = {PREFILL: "prefill", DECODE: "decode"}


def _text_rows(trace: Trace) -> Iterator[tuple[list[int], list[int], list[float]]]:
    numbers = np.stack([getattr(trace, name).astype(np.int64) for name in COLUMNS], axis=1)
    yield from zip(numbers.tolist(), trace.ids.tolist(), trace.weights.astype(float).tolist(), strict=True)
