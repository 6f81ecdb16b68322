"""What a routing trace says about caching: how soon experts come back, how unevenly they are used, how many it takes.

All figures are of consecutive tokens of one request in one layer, whatever ran beside them in a batch. They are of
decoding where the trace has any, since prompts are computed expert by expert; else of the prompts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.trace import DECODE, PREFILL, Trace

LAGS = (1, 2, 4, 8, 16, 32, 64)
WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """One layer, or the mean over the layers. Shares are of 1; None where there is nothing to measure.

    ``overlap`` is the share of a token's experts that the token before had chosen, ``first_repeated`` how often both
    have the same first choice (the largest weight), ``any_shared`` how often they share at least one expert (the last
    two as in table 5 of Jiang et al., "Mixtral of Experts", arXiv 2401.04088). ``entropy`` is that of all uses, and
    ``entropy_in_request`` the mean of the requests' own, as a share of the most there can be. ``gini`` is 0 if all
    experts are used alike and near 1 if one has all; ``top_10`` and ``top_25`` are the uses of the most used 10 and
    25 % of the experts. ``distinct`` is the share of experts that were used at all. ``foretold`` is the share of
    experts that a table of the layer before foretells with top_k guesses (trained on the first half, measured on the
    second).
    """

    overlap: float | None
    first_repeated: float | None
    any_shared: float | None
    entropy: float | None
    entropy_in_request: float | None
    gini: float | None
    top_10: float | None
    top_25: float | None
    distinct: float | None
    foretold: float | None


@dataclass(frozen=True, slots=True)
class TraceStatistics:
    """A whole trace. ``lags`` are (tokens between, mean overlap), ``working_set`` (tokens, mean number of distinct
    experts of a layer in so many tokens), ``uniform_overlap`` what chance alone would give."""

    model: str
    rows: int
    requests: int
    layers: int
    experts: int
    top_k: int
    prefill_tokens: int
    decode_tokens: int
    passes: int
    events: int
    largest_event: int
    measured: str
    uniform_overlap: float
    mean: LayerStatistics
    by_layer: tuple[tuple[int, LayerStatistics], ...]
    lags: tuple[tuple[int, float], ...]
    working_set: tuple[tuple[int, float], ...]

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["by_layer"] = [{"layer": layer} | asdict(one) for layer, one in self.by_layer]
        for name, unit in (("lags", "overlap"), ("working_set", "distinct_experts")):
            values[name] = [{"tokens": tokens, unit: value} for tokens, value in values[name]]
        return values


def trace_statistics(trace: Trace) -> TraceStatistics:
    """Measure ``trace``, which may be empty."""
    phase = DECODE if (trace.phase == DECODE).any() else PREFILL
    uses = _Uses.of(trace.rows(trace.phase == phase))
    layer_numbers = np.unique(trace.layer)
    by_layer = uses.by_layer()
    tokens = [_tokens(trace, which) for which in (PREFILL, DECODE)]
    sizes = _event_sizes(trace)
    return TraceStatistics(
        model=str(trace.meta["model"]),
        rows=len(trace),
        requests=len(np.unique(trace.request)),
        layers=len(layer_numbers),
        experts=trace.experts,
        top_k=trace.top_k,
        prefill_tokens=tokens[0],
        decode_tokens=tokens[1],
        passes=len(np.unique(trace.forward)),
        events=len(sizes),
        largest_event=int(sizes.max(initial=0)),
        measured="decode" if phase == DECODE else "prefill",
        uniform_overlap=trace.top_k / trace.experts,
        mean=_mean([one for _, one in by_layer]),
        by_layer=tuple(by_layer),
        lags=tuple((lag, value) for lag in LAGS if (value := uses.overlap_at(lag)) is not None),
        working_set=tuple(uses.working_sets()),
    )


def _tokens(trace: Trace, phase: int) -> int:
    of_phase = trace.phase == phase
    return len(np.unique(trace.request[of_phase] * np.int64(1 << 32) + trace.step[of_phase]))


def _event_sizes(trace: Trace) -> NDArray[Any]:
    """Distinct experts of each event."""
    if not len(trace):
        return np.zeros(0, np.int64)
    event = np.cumsum((np.diff(trace.forward, prepend=-1) != 0) | (np.diff(trace.layer, prepend=-1) != 0)) - 1
    used = trace.ids < trace.experts
    key = np.sort((event[:, None] * np.int64(trace.experts) + trace.ids)[used])
    distinct = key[np.diff(key, prepend=-1) != 0]
    return np.bincount(distinct // trace.experts, minlength=int(event[-1]) + 1)


def _mean(parts: list[LayerStatistics]) -> LayerStatistics:
    def of(name: str) -> float | None:
        values = [value for part in parts if (value := getattr(part, name)) is not None]
        return float(np.mean(values)) if values else None

    return LayerStatistics(**{name: of(name) for name in LayerStatistics.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class _Uses:
    """The rows sorted by layer, request and step, and every use of an expert in them.

    ``group`` [N] numbers the (layer, request) of a row and ``place`` [N] the row in its group. ``row`` and ``expert``
    [U] are the uses, without "no expert".
    """

    trace: Trace
    group: NDArray[np.int64]
    place: NDArray[np.int64]
    layer: NDArray[np.int64]
    row: NDArray[np.int64]
    expert: NDArray[np.int64]

    @classmethod
    def of(cls, trace: Trace) -> _Uses:
        trace = trace.rows(np.lexsort((np.arange(len(trace)), trace.request, trace.layer)))
        new = (np.diff(trace.layer, prepend=-1) != 0) | (np.diff(trace.request, prepend=-1) != 0)
        group = np.cumsum(new) - 1
        starts = np.flatnonzero(new)
        place = np.arange(len(trace)) - starts[group] if len(trace) else group
        layer = np.searchsorted(np.unique(trace.layer), trace.layer)
        row, column = np.nonzero(trace.ids < trace.experts)
        return cls(trace, group, place, layer, row, trace.ids[row, column].astype(np.int64))

    def shared_with_before(self, lag: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """For each row whether the token ``lag`` steps before is there, and for each use whether that token has it."""
        width = int(self.trace.step.max(initial=0)) + 1
        token = self.group * width + self.trace.step
        before = np.where(self.trace.step >= lag, token - lag, -1)
        has_before = np.isin(before, token)
        use = token[self.row] * self.trace.experts + self.expert
        shared = np.isin(use - lag * self.trace.experts, use) & has_before[self.row]
        return has_before, shared

    def overlap_at(self, lag: int) -> float | None:
        has_before, shared = self.shared_with_before(lag)
        possible = int(has_before[self.row].sum())
        return int(shared.sum()) / possible if possible else None

    def working_sets(self) -> list[tuple[int, float]]:
        """Mean number of distinct experts of a layer in so many consecutive tokens of a request, for :data:`WINDOWS`.

        An expert is in the windows that end at its use or less than ``window`` tokens after it, until it is used
        again; only windows that are full count.
        """
        lengths = np.bincount(self.group)
        place, group = self.place[self.row], self.group[self.row]
        order = np.lexsort((place, self.expert, group))
        place, group, expert = place[order], group[order], self.expert[order]
        again = lengths[group]
        same = (np.diff(group) == 0) & (np.diff(expert) == 0)
        again[:-1][same] = place[1:][same]
        found = []
        for window in WINDOWS:
            windows = int(np.maximum(lengths - window + 1, 0).sum())
            if windows:
                counted = np.minimum(place + window, again) - np.maximum(place, window - 1)
                found.append((window, int(np.maximum(counted, 0).sum()) / windows))
        return found

    def by_layer(self) -> list[tuple[int, LayerStatistics]]:
        numbers = np.unique(self.trace.layer)
        experts = self.trace.experts
        has_before, shared = self.shared_with_before(1)
        shared_in_row = np.bincount(self.row[shared], minlength=len(self.trace))
        first = np.take_along_axis(self.trace.ids, self.trace.weights.argmax(axis=1)[:, None], axis=1)[:, 0]
        same_first = np.concatenate([[False], first[1:] == first[:-1]]) if len(first) else first == first
        within = self._entropies_in_requests(len(numbers))
        foretold = self._foretold(len(numbers))
        found = []
        for index, number in enumerate(numbers.tolist()):
            of_layer = self.layer == index
            pairs = of_layer & has_before
            uses = of_layer[self.row]
            counts = np.bincount(self.expert[uses], minlength=experts)
            found.append(
                (
                    number,
                    LayerStatistics(
                        overlap=_share(shared[uses].sum(), pairs[self.row].sum()),
                        first_repeated=_share((same_first & pairs).sum(), pairs.sum()),
                        any_shared=_share((shared_in_row[pairs] > 0).sum(), pairs.sum()),
                        entropy=_entropy(counts),
                        entropy_in_request=within[index],
                        gini=_gini(counts),
                        top_10=_top(counts, 0.10),
                        top_25=_top(counts, 0.25),
                        distinct=float((counts > 0).mean()),
                        foretold=foretold[index],
                    ),
                )
            )
        return found

    def _entropies_in_requests(self, layers: int) -> list[float | None]:
        """By layer, the mean over its requests, weighted by their uses."""
        experts = self.trace.experts
        if experts == 1 or not len(self.row):
            return [None] * layers
        keys, counts = np.unique(self.group[self.row] * experts + self.expert, return_counts=True)
        groups = keys // experts
        sums = np.bincount(groups, weights=counts, minlength=int(self.group[-1]) + 1)
        logs = np.bincount(groups, weights=counts * np.log(counts), minlength=len(sums))
        # n * H = n log n - sum(c log c)
        weighted = sums * np.log(np.maximum(sums, 1)) - logs
        layer_of_group = self.layer[np.flatnonzero(np.diff(self.group, prepend=-1))]
        of_layer = np.bincount(layer_of_group, weights=weighted, minlength=layers)
        uses = np.bincount(layer_of_group, weights=sums, minlength=layers)
        return [float(h / n / np.log(experts)) if n else None for h, n in zip(of_layer, uses, strict=True)]

    def _foretold(self, layers: int) -> list[float | None]:
        """By layer: recall of top_k guesses from a first-order table of the layer before. None for the first."""
        trace, experts = self.trace, self.trace.experts
        token = trace.request.astype(np.int64) * (int(trace.step.max(initial=0)) + 1) + trace.step
        found: list[float | None] = [None] * layers
        for index in range(1, layers):
            above, below = np.flatnonzero(self.layer == index - 1), np.flatnonzero(self.layer == index)
            _, left, right = np.intersect1d(token[above], token[below], return_indices=True)
            left, right = above[left[: 2 * _TABLE_TOKENS]], below[right[: 2 * _TABLE_TOKENS]]
            half = len(left) // 2
            if not half:
                continue
            before, now = (_one_hot(trace.ids[rows], experts) for rows in (left, right))
            table = before[:half].T @ now[:half] + 1.0  # Laplace's rule, for pairs never seen
            scores = before[half:] @ (table / table.sum(axis=1, keepdims=True))
            guesses = np.argsort(-scores, axis=1, kind="stable")[:, : trace.top_k]
            right_ones = np.take_along_axis(now[half:], guesses, axis=1).sum()
            found[index] = _share(right_ones, now[half:].sum())
        return found


_TABLE_TOKENS = 2048


def _one_hot(ids: NDArray[Any], experts: int) -> NDArray[np.float32]:
    hot = np.zeros((len(ids), experts + 1), np.float32)
    np.put_along_axis(hot, ids.astype(np.int64), 1.0, axis=1)
    return hot[:, :experts]


def _share(part: Any, whole: Any) -> float | None:
    return float(part) / float(whole) if whole else None


def _entropy(counts: NDArray[Any]) -> float | None:
    total = counts.sum()
    if not total or len(counts) < 2:
        return None
    shares = counts[counts > 0] / total
    return float(-(shares * np.log(shares)).sum() / np.log(len(counts)))


def _gini(counts: NDArray[Any]) -> float | None:
    total = counts.sum()
    if not total:
        return None
    ranks = np.arange(1, len(counts) + 1)
    return float((2 * ranks - len(counts) - 1) @ np.sort(counts) / (len(counts) * total))


def _top(counts: NDArray[Any], share: float) -> float | None:
    most = np.sort(counts)[::-1][: max(1, round(share * len(counts)))]
    return _share(most.sum(), counts.sum())
