"""What ``run-local tune`` does: from traces and a budget to the flags to use."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.hardware import Hardware, HardwareError, load_hardware
from cache.policies import PolicyError
from cache.trace import Trace, save_trace
from cache.trace_edit import requests_of, select
from cache.tune import (
    Candidate,
    Laboratory,
    TuneError,
    TuneResult,
    TuneSettings,
    candidates,
    default_specs,
    split_specs,
)
from offload.config import SCOPES, format_size
from offload.errors import RunLocalError, UsageError
from offload.events import LoadProgress
from offload.laboratory.sweep import run_sweep
from offload.laboratory.traces import read_traces

DEFAULT_RESIDENCIES = (0.125, 0.25, 0.5)


@dataclass(frozen=True, slots=True)
class TuneRequest:
    """The command's own flags; None and () are what was not given. Sizes in bytes."""

    traces: tuple[Path, ...]
    residency: tuple[float, ...] = ()
    slots: int | None = None
    ram: int | None = None
    vram: int | None = None
    expert_size: int | None = None
    resident_size: int | None = None
    policy: tuple[str, ...] = ()
    scope: tuple[str, ...] = SCOPES
    predictor: tuple[str, ...] = ("off",)
    folds: int = 5
    requests: int | None = None
    cold: bool = False
    seed: int = 0
    hardware: str | None = None
    jobs: int | None = None

    def __post_init__(self) -> None:
        for value in self.residency:
            if not 0 < value <= 1:
                raise UsageError(f"--residency must be above 0 and at most 1 (0.5 is half), not {value:g}")
        for flag, least in (("slots", 1), ("folds", 1), ("requests", 1), ("jobs", 1), ("ram", 1), ("vram", 1)):
            number = getattr(self, flag)
            if number is not None and number < least:
                raise UsageError(f"--{flag} must be at least {least}")
        budgets = [f"--{flag}" for flag in ("slots", "ram", "vram") if getattr(self, flag) is not None]
        if len(budgets) > 1:
            raise UsageError(f"{' and '.join(budgets)} are different budgets; give one of them")


@dataclass(frozen=True, slots=True)
class Tuned:
    """The result, the size that the budget allows, and the flags for it. ``notes`` are lines for the user."""

    result: TuneResult
    slots: int
    budget: tuple[str, str]
    notes: tuple[str, ...]
    trace: Trace
    files: tuple[Path, ...]

    @property
    def learns(self) -> bool:
        """Whether policy and predictor shall learn from the traces before they start."""
        return self.result.at(self.slots).best.candidate.learn

    @property
    def flags(self) -> list[tuple[str, str]]:
        learn = [("--learn-from", str(file)) for file in self.files] if self.learns else []
        return [*self.result.at(self.slots).best.candidate.flags(), self.budget, *learn]

    def command(self) -> str:
        """One line to paste."""
        return "run-local chat " + " ".join(f"{flag} {_quoted(value)}" for flag, value in self.flags)

    def to_json(self) -> dict[str, Any]:
        return self.result.to_json() | {
            "slots": self.slots,
            "flags": [list(pair) for pair in self.flags],
            "command": self.command(),
        }


def run_tune(request: TuneRequest, default: tuple[str, str], on_event: Callable[[LoadProgress], None]) -> Tuned:
    """Replay everything that ``request`` asks for. ``default`` are the policy and the scope that others are held
    against.

    Raises UsageError for flags that make no sense, RunLocalError for traces that cannot be read.
    """
    hardware, wanted = _hardware(request.hardware), _candidates(request)
    trace = read_traces(request.traces)
    trace = select(trace, requests_of(trace)[: request.requests]) if request.requests else trace
    if not len(trace):
        raise RunLocalError(f"{request.traces[0]}: the trace is empty: record some answers with --trace-out FILE")
    return _sweep(request, trace, hardware, wanted, default, on_event)


def tune_beside(trace: Trace, slots: int, now: tuple[str, str], on_event: Callable[[LoadProgress], None]) -> Tuned:
    """Which policy and scope would suit ``trace`` with ``slots`` slots, against those of ``now``: only what a running
    engine can change to, so that nothing learns beforehand. It runs in processes beside this one.

    Raises UsageError for a trace that nothing can be learned from, and whatever ``on_event`` raises, which ends it.
    """
    experts = len(set(trace.layer.tolist())) * trace.experts
    request = TuneRequest(traces=(), slots=slots, residency=(min(1.0, slots / experts),))
    wanted = tuple(candidate for candidate in _candidates(request) if not candidate.learn)
    return _sweep(request, trace, None, wanted, now, on_event, aside=True)


def _candidates(request: TuneRequest) -> tuple[Candidate, ...]:
    try:
        specs = [spec for text in request.policy for spec in split_specs(text)] or default_specs()
        predictors = [None if name == "off" else name for name in request.predictor]
        return candidates(specs, request.scope, predictors)
    except TuneError as error:
        raise UsageError(f"--policy or --scope: {error}") from error


def _sweep(
    request: TuneRequest,
    trace: Trace,
    hardware: Hardware | None,
    wanted: tuple[Candidate, ...],
    default: tuple[str, str],
    on_event: Callable[[LoadProgress], None],
    *,
    aside: bool = False,
) -> Tuned:
    experts = len(set(trace.layer.tolist())) * trace.experts
    record_bytes = request.expert_size or trace.meta.get("expert_bytes")
    if hardware is not None and record_bytes is None:
        raise UsageError("--hardware needs the size of an expert, which this trace does not name: give --expert-size")
    budget = _budget(request, trace, experts)
    residencies = request.residency or (() if budget else DEFAULT_RESIDENCIES) or DEFAULT_RESIDENCIES
    sizes = {max(1, round(residency * experts)): ("--residency", f"{residency:g}") for residency in residencies}
    slots, flag = budget or max(sizes.items())
    settings = TuneSettings(
        candidates=wanted,
        slots=tuple(sorted({*sizes, slots})),
        default=Candidate(*default),
        folds=request.folds,
        cold=request.cold,
        seed=request.seed,
        record_bytes=record_bytes,
        hardware=hardware,
    )
    try:
        laboratory = Laboratory.of(trace, settings)
        scores = run_sweep(laboratory, request.jobs, on_event, aside=aside)
    except (TuneError, PolicyError) as error:
        raise UsageError(str(error)) from error
    notes = list(laboratory.skipped)
    if len(laboratory.parts) == 1:
        notes.append(
            "this trace has one request only: the choice is scored on what it was made from; record several requests "
            "for a figure to rely on"
            if len(requests_of(trace)) == 1
            else "--folds 1: the choice is scored on what it was made from"
        )
    return Tuned(laboratory.summarise(scores), slots, flag, tuple(notes), trace, request.traces)


def table_of(result: TuneResult) -> str:
    """All results as CSV, a row for each candidate and size."""
    rows = [row.to_json() for row in result.rows]
    names = [name for name in rows[0] if name != "hit_rate_by_fold"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    folds = [f"hit_rate_fold_{number}" for number in range(result.folds)]
    writer.writerow([*names, *folds])
    for row in rows:
        writer.writerow([*("" if row[name] is None else row[name] for name in names), *row["hit_rate_by_fold"]])
    return text.getvalue()


def _hardware(name: str | None) -> Hardware | None:
    if name is None:
        return None
    try:
        return load_hardware(name)
    except HardwareError as error:
        raise UsageError(f"--hardware: {error}") from error


def _budget(request: TuneRequest, trace: Trace, experts: int) -> tuple[int, tuple[str, str]] | None:
    """The slots that the budget allows, and the flag to say so. None without a budget."""
    if request.slots is not None:
        slots = min(request.slots, experts)
        return slots, ("--residency", f"{slots / experts:.6g}")
    size = request.ram if request.ram is not None else request.vram
    if size is None:
        return None
    flag = "--ram" if request.ram is not None else "--vram"
    record = request.expert_size or trace.meta.get("expert_bytes")
    resident = request.resident_size if request.resident_size is not None else trace.meta.get("resident_bytes")
    if record is None or resident is None:
        missing = [name for name, value in (("--expert-size", record), ("--resident-size", resident)) if value is None]
        raise UsageError(
            f"{flag}: how many experts fit cannot be told, since this trace was not recorded by run-local; give "
            f"{' and '.join(missing)} (run-local plan shows them), or --slots or --residency instead"
        )
    slots = (size - int(resident)) // int(record)
    if slots < 1:
        smallest = int(resident) + int(record)
        raise UsageError(
            f"{flag} {format_size(size)} leaves no room for experts: {format_size(int(resident))} are needed for "
            f"everything else; the smallest that works is {flag} {-(-smallest // 2**20)}MiB"
        )
    return min(int(slots), experts), (flag, _exact(size))


def _exact(size: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)


def _quoted(value: str) -> str:
    return shlex.quote(value)


def check_files(files: Sequence[tuple[str, Path | None]]) -> None:
    """Find out before the sweep that a file could not be written. Raises UsageError."""
    for flag, path in files:
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{flag}: {path} cannot be written (no such folder)")
        if path is not None and path.is_dir():
            raise UsageError(f"{flag}: {path} is a folder")


def keep_learned(tuned: Tuned, file: Path) -> list[tuple[str, str]]:
    """The flags for a preset. What is learned from goes into ``file``, so that the traces may be deleted.

    Raises RunLocalError if it cannot be written.
    """
    if not tuned.learns:
        return tuned.flags
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_trace(file, tuned.trace)
    except OSError as error:
        raise RunLocalError(f"--save: {file} cannot be written ({error.strerror})") from error
    return [*(pair for pair in tuned.flags if pair[0] != "--learn-from"), ("--learn-from", str(file))]
