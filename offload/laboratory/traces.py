"""What ``run-local trace`` does: look at traces, convert, merge, split and make them."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from cache.events import trace_events
from cache.predictors.evaluate import evaluate
from cache.synthetic import MODELS, SyntheticError, SyntheticSettings, synthetic_trace
from cache.trace import DECODE, Trace, TraceError
from cache.trace_edit import folds, mend, merge, requests_of, select
from cache.trace_forms import SUFFIXES, read_trace, write_trace
from cache.trace_forms.base import PHASES
from cache.trace_statistics import trace_statistics
from cache.tune import replayed_predictors
from offload.errors import RunLocalError, UsageError


def read_traces(
    files: Sequence[Path],
    form: str | None = None,
    model: str | None = None,
    experts: int | None = None,
    phase: str | None = None,
) -> Trace:
    """One trace of all ``files``, of any known form. Raises RunLocalError with one line."""
    if phase is not None and phase not in PHASES:
        raise UsageError(f"--phase: '{phase}' is not one of prefill, decode")
    try:
        traces = [
            read_trace(file, form, model=model, experts=experts, phase=DECODE if phase is None else PHASES[phase])
            for file in files
        ]
        return traces[0] if len(traces) == 1 else merge(traces, [str(file) for file in files])
    except TraceError as error:
        raise RunLocalError(str(error)) from error


def describe(file: Path, recall: Sequence[int] = ()) -> dict[str, Any]:
    """The statistics of one trace, as JSON values; with ``recall`` also how well predictors foretell it with so many
    guesses. Raises RunLocalError."""
    if any(limit < 1 for limit in recall):
        raise UsageError("--recall must be at least 1")
    trace = read_traces([file])
    if not len(trace):
        raise RunLocalError(f"{file}: the trace is empty: nothing was answered while it was recorded")
    found = {"file": str(file)} | trace_statistics(trace).to_json()
    return found | {"predictors": _predictors(trace, recall)} if recall else found


def _predictors(trace: Trace, recall: Sequence[int]) -> list[dict[str, Any]]:
    """Recall and precision on the second half of the requests, after learning from the first half; of one request, on
    all of it, learning on the way."""
    requests = requests_of(trace)
    half = len(requests) // 2
    training = trace_events(select(trace, requests[:half])) if half else None
    events = trace_events(select(trace, requests[half:]))
    return [
        {"predictor": name, "guesses": score.m, "recall": score.recall, "precision": score.precision}
        for name in replayed_predictors()
        for score in evaluate(name, events, trace.experts, recall, training)
    ]


def convert(
    files: Sequence[Path],
    output: Path,
    form: str | None = None,
    model: str | None = None,
    experts: int | None = None,
    phase: str | None = None,
    sort: bool = False,
) -> str:
    """Read ``files`` and write them as one; what was written, in words. Raises RunLocalError."""
    _check_output(output)
    if sort:
        try:
            traces = [mend(file) for file in files]
            trace = traces[0] if len(traces) == 1 else merge(traces, [str(file) for file in files])
        except TraceError as error:
            raise RunLocalError(str(error)) from error
    else:
        trace = read_traces(files, form, model, experts, phase)
    _write(output, trace)
    return _in_words(output, trace)


def split(file: Path, output: Path, parts: int | None) -> list[str]:
    """A file for each request, or ``parts`` files with the requests dealt out; OUT-0.npz, OUT-1.npz and so on."""
    _check_output(output)
    trace = read_traces([file])
    requests = requests_of(trace)
    if parts is not None and not 1 <= parts <= len(requests):
        raise UsageError(f"--folds: {file} has {len(requests)} requests; give 1 to {len(requests)}")
    groups = [[request] for request in requests] if parts is None else folds(requests, parts)
    digits = len(str(len(groups) - 1))
    names = [output.with_name(f"{output.stem}-{number:0{digits}}{output.suffix}") for number in range(len(groups))]
    for name, group in zip(names, groups, strict=True):
        _write(name, select(trace, group))
    return [str(name) for name in names]


def make(output: Path, like: str | None, given: dict[str, Any]) -> str:
    """A made trace; ``given`` are fields of SyntheticSettings that replace those of the model ``like``."""
    _check_output(output)
    if like is not None and like not in MODELS:
        raise UsageError(f"--like: there is no '{like}'; there are {', '.join(MODELS)}")
    base = MODELS[like] if like is not None else SyntheticSettings()
    known = {field.name for field in fields(SyntheticSettings)}
    try:
        trace = synthetic_trace(replace(base, **{name: value for name, value in given.items() if name in known}))
    except SyntheticError as error:
        name, _, rest = str(error).partition(" ")
        raise UsageError(f"--{name.replace('_', '-')} {rest}") from error
    _write(output, trace)
    return _in_words(output, trace)


def shares_by_layer(text: str, flag: str) -> float | tuple[tuple[int, float], ...]:
    """``0.3``, or ``0:0.14,15:0.26`` for layers with straight lines between them. Raises UsageError."""
    try:
        if ":" not in text:
            return float(text)
        pairs = (part.split(":") for part in text.split(","))
        return tuple((int(layer), float(share)) for layer, share in pairs)
    except ValueError:
        raise UsageError(f"{flag}: '{text}' is neither a number nor a list such as 0:0.14,15:0.26") from None


def _check_output(output: Path) -> None:
    if output.suffix not in SUFFIXES:
        raise UsageError(f"{output}: the name must end in {', '.join(SUFFIXES)}, which says how it is written")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"{output}: there is no folder {output.absolute().parent}")


def _write(output: Path, trace: Trace) -> None:
    try:
        write_trace(output, trace)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno is not None else str(error) or errno.errorcode[errno.EIO]
        raise RunLocalError(f"{output}: cannot be written ({reason})") from error


def _in_words(output: Path, trace: Trace) -> str:
    return (
        f"{output}: {len(trace)} rows of {len(requests_of(trace))} requests, {trace.meta['layers']} layers, "
        f"{trace.experts} experts, top {trace.top_k}"
    )
