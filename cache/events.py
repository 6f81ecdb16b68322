"""A trace as the cache sees it: one event for each (forward pass, layer), with its distinct experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from cache.recent import choosing_rows, recent_rows
from cache.trace import DECODE, Trace


@dataclass(frozen=True, slots=True)
class Events:
    """E events in execution order, A accesses in all; one access is one distinct expert of one event.

    ``request`` (that of the first row), ``decode`` (bool: all rows do), ``layer`` and ``tokens`` (rows that ran
    together) are [E]. The experts of event ``e`` are ``experts[starts[e]:starts[e + 1]]``, in the order of
    :func:`by_rank`, and ``weights`` [A] are the router's weights of each, summed over the event's tokens. ``starts`` is
    [E + 1]. ``recent`` are, of the events of several tokens, the experts that an expert cache is told of as recently
    used, in groups (:func:`cache.recent.recent_tokens`, :meth:`cache.expert_cache.ExpertCache.lookup`).
    ``layer_experts``: how many experts a layer has, 0 if it is not known.
    """

    request: NDArray[np.int32]
    decode: NDArray[np.bool_]
    layer: NDArray[np.int16]
    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    experts: NDArray[np.int16]
    weights: NDArray[np.float32]
    recent: Mapping[int, Sequence[Sequence[int]]] = field(default_factory=dict)
    layer_experts: int = 0

    def __len__(self) -> int:
        return len(self.layer)

    def layers(self) -> list[int]:
        """The MoE layers that occur, ascending."""
        return [int(layer) for layer in np.unique(self.layer)]

    def event_of_access(self) -> NDArray[np.int64]:
        """The event of each access, [A]."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def sets(self) -> list[list[int]]:
        """The experts of every event as lists."""
        flat, starts = self.experts.tolist(), self.starts.tolist()
        return [flat[start:end] for start, end in pairwise(starts)]

    def rows(self) -> Iterator[tuple[int, bool, list[int]]]:
        """Layer, decode and experts of every event."""
        return zip(self.layer.tolist(), self.decode.tolist(), self.sets(), strict=True)

    def experts_of_a_token(self) -> int:
        """The most that one decoded token took of a layer, at least 1."""
        sizes = np.diff(self.starts)[self.decode & (self.tokens == 1)]
        return int(sizes.max(initial=1))

    def where(self, keep: NDArray[np.bool_]) -> Events:
        """The events for which ``keep`` [E] is true."""
        counts = np.diff(self.starts)
        access = np.repeat(keep, counts)
        number = (np.cumsum(keep) - 1).tolist()
        return Events(
            self.request[keep],
            self.decode[keep],
            self.layer[keep],
            self.tokens[keep],
            np.concatenate([[0], np.cumsum(counts[keep])]).astype(np.int64),
            self.experts[access],
            self.weights[access],
            {number[event]: groups for event, groups in self.recent.items() if keep[event]},
            self.layer_experts,
        )


def trace_events(trace: Trace) -> Events:
    """The events of ``trace``, in the order of their first rows. Ids that name no expert are left out."""
    rows, k = trace.ids.shape
    experts = int(trace.meta["experts"])
    if rows == 0:
        empty = np.zeros(0)
        return Events(
            empty.astype(np.int32), empty.astype(bool), empty.astype(np.int16), empty.astype(np.int32),
            np.zeros(1, np.int64), empty.astype(np.int16), empty.astype(np.float32),
        )  # fmt: skip
    pair = trace.forward.astype(np.int64) * (int(trace.layer.max()) + 1) + trace.layer
    _, first, number = np.unique(pair, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    order = np.argsort(first, kind="stable")
    rank[order] = np.arange(len(first))
    event = rank[number]
    first = first[order]
    # Accesses by event, then rank, then token; one that its event had before goes.
    ids = trace.ids.astype(np.int64).reshape(-1)
    row = np.repeat(event, k)
    order = np.lexsort((np.tile(np.arange(k), rows), row))
    order = order[(ids[order] >= 0) & (ids[order] < experts)]
    code, weights = row[order] * experts + ids[order], trace.weights.reshape(-1)[order].astype(np.float32)
    _, at, places = np.unique(code, return_index=True, return_inverse=True)
    summed = np.bincount(places, weights, len(at))
    in_order = np.argsort(at)
    access, summed = code[at[in_order]], summed[in_order]
    counts = np.bincount(access // experts, minlength=len(first))
    return Events(
        trace.request[first],
        np.bincount(event, trace.phase != DECODE, len(first)) == 0,
        trace.layer[first],
        np.bincount(event, minlength=len(first)).astype(np.int32),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        (access % experts).astype(np.int16),
        summed.astype(np.float32),
        _recent(trace, event),
        experts,
    )


def _recent(trace: Trace, event: NDArray[np.int64]) -> dict[int, list[list[int]]]:
    """:attr:`Events.recent` of the rows of ``trace``, which are of these events [N]."""
    tokens = np.bincount(event)
    shared = np.flatnonzero(tokens[event] > 1)
    if not len(shared):
        return {}
    shared = shared[np.argsort(event[shared], kind="stable")]
    choosing = choosing_rows(trace)[shared].tolist()
    requests, ids = trace.request[shared].tolist(), trace.ids[shared]
    starts = np.flatnonzero(np.diff(event[shared], prepend=-1)).tolist()
    recent = {}
    for start, end in pairwise([*starts, len(shared)]):
        groups = recent_rows(requests[start:end], choosing[start:end])
        chosen = ([ids[start + token].tolist() for token in group] for group in groups)
        recent[int(event[shared[start]])] = [by_rank(group, trace.experts) for group in chosen]
    return recent


def by_rank(ids: Iterable[Iterable[int]], experts: int) -> list[int]:
    """The distinct experts of one event, whose tokens chose ``ids`` [T, k]: all first choices, then the second, ...

    The order in which a cache is told of them. Ids at or beyond ``experts`` name no expert.
    """
    return [expert for expert in dict.fromkeys(chain.from_iterable(zip(*ids, strict=True))) if 0 <= expert < experts]
