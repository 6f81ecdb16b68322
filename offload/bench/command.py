"""What ``run-local bench`` does, without its front end. Imports torch only where this process runs a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from offload.bench.request import BenchRequest, Setting, flag_name, parse_settings
from offload.config import EngineSettings, SamplingSettings
from offload.errors import UsageError
from offload.events import LoadProgress, Notice
from offload.memory.work import Rates


class Report(Protocol):
    """A result as JSON and as lines with a table below them, whose columns ``right`` are aligned to the right."""

    @property
    def right(self) -> tuple[int, ...]: ...

    def to_json(self) -> dict[str, Any]: ...

    def summary(self) -> list[str]: ...

    def rows(self) -> Sequence[tuple[str, ...]]: ...


@dataclass(frozen=True, slots=True)
class Host:
    """What the command line lends to a bench.

    ``open_engine`` opens the model; ``read_flags`` parses a ``bench`` command line after the command's name, raising
    UsageError; ``command`` starts this program's ``bench``, ``given`` are the shared flags that it was given.
    """

    settings: EngineSettings
    sampling: SamplingSettings
    open_engine: Callable[[], AbstractContextManager[Any]]
    read_flags: Callable[[list[str]], tuple[BenchRequest, EngineSettings]]
    command: Sequence[str]
    given: Sequence[str]
    on_event: Callable[[LoadProgress | Notice], None]


def run_bench(request: BenchRequest, text: str | None, host: Host) -> Report:
    """Do what ``request`` asks for; ``text`` is what its ``perplexity`` file holds.

    Raises UsageError before anything runs, RunLocalError for what fails.
    """
    if request.compare:
        return _compare(request, host)
    if request.mode == "calibrate":
        return _calibrate(host)
    if request.mode == "perplexity":
        from offload.bench.perplexity import evaluate

        with host.open_engine() as engine:
            return evaluate(
                engine,
                text or "",
                str(request.perplexity),
                request.tokens,
                request.reference,
                request.reference_out,
                host.on_event,
            )
    from offload.bench.speed import measure

    _check_context(request, host.settings)
    with host.open_engine() as engine:
        rates = _machine_rates(host.settings.format)
        if rates is None:
            host.on_event(Notice("bounds need the rates of this machine: bench --calibrate measures them"))
        return measure(engine, request.workload, host.sampling, request.rounds, host.on_event, rates)


def _machine_rates(weight_format: str) -> Rates | None:
    """As ``--calibrate`` stored them; None if it did not, or a rate that this format needs is missing."""
    from offload.compute.calibration import load

    found = load()
    if found is None:
        return None
    weights, flops = found.weights_bytes_per_s(weight_format), found.flops()
    if found.disk_bytes_per_s is None or weights is None or flops is None:
        return None
    return Rates(found.disk_bytes_per_s, weights, flops)


def _compare(request: BenchRequest, host: Host) -> Report:
    from offload.bench.compare import compare_quality, compare_speed

    common = [*host.given, *request.child_flags()]
    for flag in common:
        if flag.startswith(("--stats-json=", "--trace-out=", "--cache-log=")):
            name = flag.partition("=")[0]
            raise UsageError(f"{name}: every setting would overwrite this file; put the flag into one setting's FLAGS")

    def check(flags: list[str]) -> None:
        if any(flag.startswith("-h") or flag in ("--help", "--") for flag in flags):
            raise UsageError("FLAGS are flags of bench that take part in the measurement")
        for name in sorted(host.read_flags(flags)[0].given() - {"prompt_tokens", "warmup_tokens", "new_tokens"}):
            raise UsageError(f"{flag_name(name)} cannot differ between settings; give it outside of them")
        if request.mode == "perplexity" and any(flag.partition("=")[0] == "--ctx" for flag in flags):
            raise UsageError("--ctx decides the windows, which cannot differ; give it outside of the settings")
        _check_context(*host.read_flags([*common, *flags]))

    settings = parse_settings(request.compare, check)

    def command(setting: Setting, ours: list[str]) -> list[str]:
        return [*host.command, "--json", *common, *ours, *setting.flags]

    def say(line: str) -> None:
        host.on_event(Notice(line))

    if request.mode == "perplexity":
        return compare_quality(settings, command, say)
    return compare_speed(settings, request.rounds, command, say)


def _check_context(request: BenchRequest, settings: EngineSettings) -> None:
    """Raises UsageError before a model is opened, where the size of the context is known by then."""
    if request.mode == "speed" and settings.context_tokens is not None:
        request.workload.check_context(settings.context_tokens)


def _calibrate(host: Host) -> Report:
    from offload.compute.calibration import calibrate, save
    from offload.paths import packs_folder

    result = calibrate(host.settings.experts_dir or packs_folder(), host.on_event)
    host.on_event(Notice(f"written to {save(result)}"))
    return _Calibrated(result)


@dataclass(frozen=True, slots=True)
class _Calibrated:
    right: ClassVar[tuple[int, ...]] = (1,)

    result: Any

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = self.result.to_json()
        return found

    def summary(self) -> list[str]:
        return []

    def rows(self) -> Sequence[tuple[str, ...]]:
        rows: Sequence[tuple[str, ...]] = self.result.rows()
        return rows
