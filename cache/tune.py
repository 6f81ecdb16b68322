"""Which policy and which cache size suit a trace: candidates are replayed on requests that they never learned from.

The requests are dealt into folds (grouped k-fold). Each fold is replayed by itself; what learns beforehand is given the
other folds. The choice among candidates is scored the same way: for each fold the winner of the other folds is taken,
and what it gains over the default on this one is the gain that a user can expect.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np

from cache.events import Events, trace_events
from cache.hardware import Hardware
from cache.policies import POLICIES, PolicyContext, PolicyError, make_policy, runtime_policies
from cache.predictors import (
    NextGatePrediction,
    PredictorContext,
    PredictorError,
    make_predictor,
    runtime_predictors,
)
from cache.replay_result import Part
from cache.shares import SCOPES
from cache.simulate import ReplaySettings, replay_events
from cache.trace import Trace
from cache.trace_edit import folds, requests_of, select

REFERENCE = "belady"
GRID: dict[str, tuple[str, ...]] = {
    "ewma": ("ewma", "ewma:half_life=4", "ewma:half_life=8", "ewma:half_life=32", "ewma:half_life=64"),
}
"""What stands for a policy's name where nothing else is asked for: its parameters are tuned as well."""


class TuneError(ValueError):
    """A sweep that makes no sense; the message is one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run the cache. ``predictor`` None reads nothing ahead; with ``learn`` policy and predictor learn from
    other requests before they start."""

    policy: str
    scope: str = "layer"
    predictor: str | None = None
    learn: bool = False

    @property
    def is_reference(self) -> bool:
        return POLICIES[self.policy.partition(":")[0]].simulation_only

    def flags(self) -> list[tuple[str, str]]:
        """What to give to ``chat``: flags and values, without what to learn from."""
        given = [("--policy", self.policy), ("--scope", self.scope)]
        return given if self.predictor is None else [*given, ("--prefetch", self.predictor)]


@dataclass(frozen=True, slots=True)
class TuneSettings:
    """``slots`` are the cache sizes to try, of the whole cache; ``cold`` starts every request from an empty cache."""

    candidates: tuple[Candidate, ...]
    slots: tuple[int, ...]
    default: Candidate
    folds: int = 5
    cold: bool = False
    seed: int = 0
    record_bytes: int | None = None
    hardware: Hardware | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One replay; they can run in any order, and at once."""

    candidate: Candidate
    slots: int
    fold: int


@dataclass(frozen=True, slots=True)
class Score:
    """What a replay counted. ``seconds`` is None without hardware."""

    hits: int
    pending: int
    misses: int
    loads: int
    steady_hits: int
    steady_accesses: int
    seconds: float | None = None
    tokens: int = 0

    def __add__(self, other: Score) -> Score:
        seconds = None if self.seconds is None or other.seconds is None else self.seconds + other.seconds
        names = [name for name in Score.__dataclass_fields__ if name != "seconds"]
        return Score(**{name: getattr(self, name) + getattr(other, name) for name in names}, seconds=seconds)

    @property
    def accesses(self) -> int:
        return self.hits + self.pending + self.misses

    @property
    def hit_rate(self) -> float:
        return self.hits / self.accesses if self.accesses else 0.0

    @property
    def steady_hit_rate(self) -> float | None:
        return self.steady_hits / self.steady_accesses if self.steady_accesses else None

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None

    @property
    def value(self) -> float:
        """What candidates are ranked by: the predicted speed if it is known, else the hit rate."""
        speed = self.tokens_per_s
        return self.hit_rate if speed is None else speed


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate at one size: all folds together, and each fold's own. ``below_belady`` is in points of hit rate."""

    candidate: Candidate
    slots: int
    residency: float
    score: Score
    by_fold: tuple[Score, ...]
    below_belady: float | None = None

    @property
    def spread(self) -> float | None:
        """Standard deviation of the hit rate over the folds."""
        rates = [score.hit_rate for score in self.by_fold]
        return stdev(rates) if len(rates) > 1 else None

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self.candidate),
            "slots": self.slots,
            "residency": self.residency,
            "hit_rate": self.score.hit_rate,
            "hit_rate_spread": self.spread,
            "steady_hit_rate": self.score.steady_hit_rate,
            "below_belady": self.below_belady,
            "tokens_per_s": self.score.tokens_per_s,
            **{name: getattr(self.score, name) for name in ("hits", "pending", "misses", "loads")},
            "hit_rate_by_fold": [score.hit_rate for score in self.by_fold],
        }


@dataclass(frozen=True, slots=True)
class Advice:
    """What to use at one size. The gains are over the default, by fold: in points of hit rate, or with hardware as a
    share of the speed. ``first`` is best on all requests; ``best`` is the same unless such choices gain nothing on
    requests that took no part in them: then it is the default. ``validated`` is False where there was one fold only, so
    that the choice was scored on what it was made from."""

    slots: int
    residency: float
    best: Row
    first: Row
    default: Row
    gains: tuple[float, ...]
    by_speed: bool
    validated: bool

    @property
    def gain(self) -> float:
        return fmean(self.gains)

    @property
    def spread(self) -> float | None:
        return stdev(self.gains) if len(self.gains) > 1 else None

    def to_json(self) -> dict[str, Any]:
        return {
            "slots": self.slots,
            "residency": self.residency,
            **asdict(self.best.candidate),
            "best_on_all_requests": asdict(self.first.candidate),
            "default": asdict(self.default.candidate),
            "is_default": self.best.candidate == self.default.candidate,
            "flags": dict(self.best.candidate.flags()),
            "gain": self.gain,
            "gain_spread": self.spread,
            "gain_by_fold": list(self.gains),
            "gain_unit": "share of tokens_per_s" if self.by_speed else "points of hit rate (of 1)",
            "cross_validated": self.validated,
        }


@dataclass(frozen=True, slots=True)
class TuneResult:
    model: str
    experts: int
    requests: int
    folds: int
    events: int
    rows: tuple[Row, ...]
    advice: tuple[Advice, ...]

    def at(self, slots: int) -> Advice:
        return next(one for one in self.advice if one.slots == slots)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "experts": self.experts,
            "requests": self.requests,
            "folds": self.folds,
            "events": self.events,
            "results": [row.to_json() for row in self.rows],
            "advice": [one.to_json() for one in self.advice],
        }


@dataclass(slots=True)
class Laboratory:
    """A trace cut into folds, on which tasks run. It can be sent to another process."""

    settings: TuneSettings
    model: str
    experts: int
    parts: list[list[int]]
    tests: list[Events]
    training: list[Events | None]
    skipped: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, trace: Trace, settings: TuneSettings) -> Laboratory:
        """Raises TuneError for a trace or candidates that nothing can be learned from."""
        requests = requests_of(trace)
        if not requests:
            raise TuneError("the trace is empty: record some answers with --trace-out FILE")
        if settings.folds < 1:
            raise TuneError("--folds must be at least 1")
        parts = folds(requests, settings.folds)
        tests = [trace_events(select(trace, part)) for part in parts]
        training: list[Events | None] = [None]
        if len(parts) > 1:
            training = [trace_events(select(trace, [one for one in requests if one not in part])) for part in parts]
        experts = len(set(trace.layer.tolist())) * trace.experts
        laboratory = cls(settings, str(trace.meta["model"]), experts, parts, tests, training)
        laboratory._check()
        return laboratory

    def _check(self) -> None:
        """Leave out what cannot run on this trace and say why. Raises TuneError for parameters that do not exist."""
        if self.training[0] is None and any(candidate.learn for candidate in self.settings.candidates):
            self.skipped.append("nothing learns beforehand here: that takes other requests to learn from")
            kept = tuple(candidate for candidate in self.settings.candidates if not candidate.learn)
            self.settings = replace(self.settings, candidates=kept)
        for candidate in {self.settings.default, *self.settings.candidates}:
            training = self.training[0]
            if training is not None:  # none of its events: only whether there is something to learn from matters here
                training = training.where(np.zeros(len(training), bool)) if candidate.learn else None
            context = PolicyContext(candidate.scope, self.settings.seed, future=self.tests[0], training=training)
            try:
                make_policy(candidate.policy, context)
                if candidate.predictor is not None:
                    layers = tuple(self.tests[0].layers())
                    most = int(self.tests[0].experts.max(initial=0)) + 1
                    make_predictor(candidate.predictor, PredictorContext(layers, most, self.tests[0]))
            except (PolicyError, PredictorError) as error:
                raise TuneError(str(error)) from error

    def tasks(self) -> list[Task]:
        """Everything to run: the largest caches first, since they take longest."""
        candidates = dict.fromkeys([self.settings.default, *self.settings.candidates, *self._references()])
        sizes = sorted(set(self.settings.slots), reverse=True)
        return [Task(*parts) for parts in itertools.product(candidates, sizes, range(len(self.parts)))]

    def run(self, task: Task) -> Score:
        settings = ReplaySettings(
            policy=task.candidate.policy,
            slots=task.slots,
            scope=task.candidate.scope,
            fresh_per_request=self.settings.cold,
            seed=self.settings.seed,
            predictor=task.candidate.predictor,
            record_bytes=self.settings.record_bytes,
            hardware=self.settings.hardware,
        )
        result = replay_events(
            self.tests[task.fold], settings, self.training[task.fold] if task.candidate.learn else None
        )
        total = result.total
        seconds = result.seconds
        return Score(
            *_counts(total),
            loads=total.loads,
            steady_hits=_counts(result.steady)[0],
            steady_accesses=result.steady.accesses,
            seconds=None if seconds is None else seconds.total,
            tokens=0 if seconds is None else seconds.tokens,
        )

    def summarise(self, scores: Mapping[Task, Score]) -> TuneResult:
        """The result of all :meth:`tasks`."""
        by_row: dict[tuple[Candidate, int], list[Score]] = {}
        for task in self.tasks():
            by_row.setdefault((task.candidate, task.slots), []).append(scores[task])
        rows = [self._row(candidate, slots, by_fold) for (candidate, slots), by_fold in by_row.items()]
        best_possible: dict[tuple[str, int], float] = {
            (row.candidate.scope, row.slots): row.score.hit_rate for row in rows if row.candidate.is_reference
        }
        rows = [
            Row(
                row.candidate, row.slots, row.residency, row.score, row.by_fold,
                best_possible[row.candidate.scope, row.slots] - row.score.hit_rate,
            )
            for row in rows
        ]  # fmt: skip
        advice = [
            self._advise([row for row in rows if row.slots == slots]) for slots in sorted(set(self.settings.slots))
        ]
        events = sum(len(events) for events in self.tests)
        requests = sum(map(len, self.parts))
        return TuneResult(self.model, self.experts, requests, len(self.parts), events, tuple(rows), tuple(advice))

    def _references(self) -> list[Candidate]:
        scopes = dict.fromkeys(one.scope for one in [*self.settings.candidates, self.settings.default])
        return [Candidate(REFERENCE, scope) for scope in scopes]

    def _row(self, candidate: Candidate, slots: int, by_fold: Sequence[Score]) -> Row:
        total = _together(by_fold, range(len(by_fold)))
        return Row(candidate, slots, slots / self.experts, total, tuple(by_fold))

    def _advise(self, rows: Sequence[Row]) -> Advice:
        """The winner of all folds, if winners of the other folds gained on each; else the default."""
        usable = [row for row in rows if not row.candidate.is_reference]
        default = next(row for row in usable if row.candidate == self.settings.default)
        count = len(self.parts)

        def winner(among: Sequence[int]) -> Row:
            # the default wins ties: no change without a reason
            return max(usable, key=lambda row: (_together(row.by_fold, among).value, row is default))

        gains = []
        for fold in range(count):
            picked = winner([other for other in range(count) if other != fold] if count > 1 else [0])
            mine, base = picked.by_fold[fold], default.by_fold[fold]
            speeds = mine.tokens_per_s, base.tokens_per_s
            if speeds[0] is not None and speeds[1] is not None:
                gains.append(speeds[0] / speeds[1] - 1)
            else:
                gains.append(mine.hit_rate - base.hit_rate)
        first = winner(range(count))
        best = first if count == 1 or fmean(gains) > 0 else default
        by_speed = default.score.tokens_per_s is not None
        return Advice(best.slots, best.residency, best, first, default, tuple(gains), by_speed, count > 1)


def _together(scores: Sequence[Score], among: Iterable[int]) -> Score:
    """The sum of some folds."""
    chosen = [scores[fold] for fold in among]
    total = chosen[0]
    for score in chosen[1:]:
        total += score
    return total


def _counts(part: Part) -> tuple[int, int, int]:
    return int(part.hits.sum()), int(part.pending.sum()), int(part.misses.sum())


def replayed_predictors() -> list[str]:
    """The names of the predictors that go by nothing but what a trace holds."""
    return [name for name in runtime_predictors() if name != NextGatePrediction.name]


def split_specs(text: str) -> list[str]:
    """Policies of ``lru,NAME:key=4|16,other=2,lfu``: a comma before ``key=value`` belongs to the policy before it, and
    ``|`` lists values to try. Raises TuneError for an empty list."""
    specs: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        head, equals, _ = part.partition("=")
        if specs and equals and ":" not in head:
            specs[-1] += f",{part}"
        elif part:
            specs.append(part)
    if not specs:
        raise TuneError(f"'{text}' names no policy; there are {', '.join(runtime_policies())}")
    return [expanded for spec in specs for expanded in _expand(spec)]


def _expand(spec: str) -> list[str]:
    name, colon, parameters = spec.partition(":")
    if "|" not in parameters or "=" not in parameters:
        return [spec]
    choices = []
    for part in parameters.split(","):
        key, _, values = part.partition("=")
        choices.append([f"{key}={value.strip()}" for value in values.split("|")])
    return [name + colon + ",".join(some) for some in itertools.product(*choices)]


def default_specs() -> list[str]:
    """Every policy that can run, with the parameters of :data:`GRID`."""
    return [spec for name in runtime_policies() for spec in GRID.get(name, (name,))]


def candidates(
    policies: Sequence[str], scopes: Sequence[str], predictors: Sequence[str | None]
) -> tuple[Candidate, ...]:
    """All combinations. Raises TuneError for a scope that does not exist, or a policy for simulation only."""
    for scope in scopes:
        if scope not in SCOPES:
            raise TuneError(f"there is no scope '{scope}'; there are {', '.join(SCOPES)}")
    found = []
    for spec, scope, predictor in itertools.product(policies, scopes, predictors):
        name, _, parameters = spec.partition(":")
        kind = POLICIES.get(name)
        if kind is None:
            raise TuneError(f"there is no policy '{name}'; there are {', '.join(runtime_policies())}")
        if kind.simulation_only:
            raise TuneError(f"{name} knows the future and is always shown for comparison; name others")
        if predictor is not None and predictor not in replayed_predictors():
            raise TuneError(
                f"'{predictor}' is no predictor that a trace can be replayed with; there are off, "
                f"{', '.join(replayed_predictors())} (measure next-gate with bench --compare: a trace holds nothing it "
                "goes by)"
            )
        needs = kind.takes is not None and not parameters  # without its file it has the other requests to go by
        both = (kind.learns and not (kind.takes and parameters)) or predictor is not None
        found += [
            Candidate(spec, scope, predictor, learn) for learn in ((True,) if needs else (False, True)[: 1 + both])
        ]
    return tuple(found)
