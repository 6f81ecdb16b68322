"""What policy and prefetch can learn before the first question: traces of earlier sessions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cache.events import Events, trace_events
from cache.trace import Trace, TraceError
from cache.trace_edit import merge, select
from cache.trace_forms import read_trace
from offload.errors import RunLocalError, UsageError


def earlier_events(files: Sequence[Path], layers: Sequence[int], experts: int) -> Events | None:
    """The events of all ``files``; None without any. ``layers`` and ``experts`` are those of the model that is loaded.

    Raises RunLocalError for a file that is no trace, UsageError for a trace of another model.
    """
    if not files:
        return None
    traces = _read(files)
    for file, trace in zip(files, traces, strict=True):
        strange = set(trace.layer.tolist()) - set(layers)
        if trace.experts != experts or strange:
            what = f"layer {min(strange)}" if strange else f"{trace.experts} experts a layer"
            raise UsageError(
                f"--learn-from: {file} is of another model ({trace.meta['model']}, with {what}; this one has "
                f"{experts} experts in {len(layers)} layers)"
            )
    return trace_events(_merged(traces, files))


def check_earlier(files: Sequence[Path]) -> Events | None:
    """Find out before a model is loaded whether the files are traces. Returns none of their events, in that form.

    Raises RunLocalError.
    """
    return trace_events(select(_merged(_read(files), files), [])) if files else None


def _read(files: Sequence[Path]) -> list[Trace]:
    try:
        return [read_trace(file) for file in files]
    except TraceError as error:
        raise RunLocalError(f"--learn-from: {error}") from error


def _merged(traces: Sequence[Trace], files: Sequence[Path]) -> Trace:
    try:
        return merge(traces, [str(file) for file in files])
    except TraceError as error:
        raise UsageError(f"--learn-from: {error}") from error
