"""Foresight: the next use of an expert, learned from the experts that this layer and its neighbours have just used."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.events import Events
from cache.keys import ExpertKey
from cache.policies.base import Policy, PolicyContext, PolicyError

_EVIDENCE = 3  # own event, that of the layer before, the last one of the layer after
_STEP = 32  # experts that tables grow by
_RESCALE = 1e200
_GAMMA_BEFOREHAND = 0.5  # while nothing is resident, as in training


class _Layer:
    """What is known of one layer. ``table`` is float32[3 E, E] (None: no room for one), the rest is [E]."""

    __slots__ = ("absent", "after", "foretold", "order", "own", "residents", "rows", "table", "total", "uses", "weight")

    def __init__(self, width: int, evidence: int) -> None:
        self.table = np.zeros((evidence * width, width), np.float32)
        self.uses = np.zeros(width)
        self.weight = 1.0
        self.total = 0.0
        self.absent = np.full(width, math.inf)  # 0 where resident
        self.residents = 0
        self.rows: NDArray[np.intp] | None = None  # the last event's evidence, as rows of the table
        self.foretold = np.zeros(width, np.float32)  # what it foretold
        self.own: list[int] = []  # the last event's experts
        self.after: int | None = None  # the layer whose event came next
        self.order: list[tuple[float, int]] | None = None  # residents by score, while nothing changes


class Foresight(Policy):
    """Gives up the record with the lowest foretold use: a learned part and the share of recent events that used it.

    The learned part is a table from evidence to future use: the experts of this event, of the event before (the layer
    below) and of the last event of the layer above each have a row, and their mean foretells the uses of this layer's
    experts, later ones for less: an event counts ``gamma`` times the one before it, where ``gamma`` is 1 minus the share of
    the layer's residents that one event takes. The table learns at every event by temporal differences: what was foretold
    an event ago moves by ``rate`` of its error towards what happened, and what is foretold now. The other part is the
    decayed count of ``ewma`` as a share, times ``mix``; an empty table leaves plain ``ewma``.

    Tables take ``table_mib`` at most: a model with so many experts that three kinds of evidence do not fit learns from
    its own layer's alone, or not at all. An event costs O(k E) additions in numpy, E the experts of one layer.

    Sources: Sutton, "Learning to predict by the methods of temporal differences", Machine Learning 3, 1988; Dayan,
    "Improving generalization for temporal difference learning: the successor representation", Neural Computation 5(4),
    1993. Their use for experts is ours (docs/cache.md tells what was tried).
    """

    name = "foresight"
    all_layers = True

    def __init__(
        self,
        layers: int = 0,
        experts: int = 0,
        *,
        half_life: float = 16.0,
        mix: float = 0.5,
        rate: float = 0.15,
        table_mib: float = 16.0,
    ) -> None:
        for name, value, top in (("half_life", half_life, math.inf), ("mix", mix, math.inf), ("rate", rate, 1.0)):
            if not (0 < value <= top and math.isfinite(value)):
                raise PolicyError(
                    f"foresight: {name} must be above 0{' and at most 1' if top == 1 else ''}, not {value}"
                )
        if not (0 <= table_mib < 2**20):
            raise PolicyError(f"foresight: table_mib must be at least 0, not {table_mib}")
        self._growth = 2.0 ** (1 / half_life)
        self._mix = mix
        self._rate = rate
        self._table_bytes = int(table_mib * 2**20)
        self._layer_count = layers or 64
        self._width = -(-max(1, experts) // _STEP) * _STEP
        self._evidence = self._evidence_that_fits()
        self._layers: dict[int, _Layer] = {}
        self._before: int | None = None  # the layer of the event before

    @classmethod
    def create(cls, context: PolicyContext, **values: Any) -> Foresight:
        policy = cls(context.layers, context.experts, **values)
        if context.training is not None:
            policy.train(context.training)
        return policy

    def record_event(self, keys: Sequence[ExpertKey]) -> None:
        if not keys:
            return
        number, experts = keys[0].layer, [key.expert for key in keys]
        if max(experts) >= self._width:
            self._grow(max(experts) + 1)
        layer = self._layers.get(number)
        if layer is None:
            layer = self._layers[number] = _Layer(self._width, self._evidence)
        chosen = np.array(experts)
        layer.order = None
        if self._evidence:
            self._learn(layer, chosen, self._rows(layer, experts))
        layer.weight *= self._growth
        layer.total += layer.weight
        layer.uses[chosen] += layer.weight
        if layer.weight > _RESCALE:
            layer.uses /= layer.weight
            layer.total /= layer.weight
            layer.weight = 1.0
        layer.own = experts
        if self._before is not None:
            self._layers[self._before].after = number
        self._before = number

    def _rows(self, layer: _Layer, experts: list[int]) -> NDArray[np.intp]:
        rows = experts
        if self._evidence > 1:
            width = self._width
            if self._before is not None:
                rows = rows + [width + expert for expert in self._layers[self._before].own]
            if layer.after is not None:
                rows = rows + [2 * width + expert for expert in self._layers[layer.after].own]
        return np.array(rows)

    def _learn(self, layer: _Layer, chosen: NDArray[np.intp], rows: NDArray[np.intp]) -> None:
        """Foretell from ``rows``, and move what the event before foretold towards what has become of it."""
        foretold = np.add.reduce(layer.table[rows], 0)
        foretold *= np.float32(1 / len(rows))
        if layer.rows is not None:
            gamma = max(0.0, 1.0 - len(chosen) / layer.residents) if layer.residents else _GAMMA_BEFOREHAND
            error = foretold * np.float32(gamma)
            error -= layer.foretold
            error[chosen] += np.float32(1 - gamma)
            error *= np.float32(self._rate)
            layer.table[layer.rows] += error
        layer.rows, layer.foretold = rows, foretold

    def admit(self, key: ExpertKey) -> None:
        if key.expert >= self._width:
            self._grow(key.expert + 1)
        layer = self._layers.get(key.layer)
        if layer is None:
            layer = self._layers[key.layer] = _Layer(self._width, self._evidence)
        layer.absent[key.expert] = 0.0
        layer.residents += 1
        layer.order = None

    def evict(self, key: ExpertKey) -> None:
        layer = self._layers[key.layer]
        layer.absent[key.expert] = math.inf
        layer.residents -= 1
        layer.order = None

    def victims(self, n: int, protected: Collection[ExpertKey], layer: int | None = None) -> list[ExpertKey] | None:
        if n <= 0:
            return []
        if layer is None:
            return self._victims_of_all(n, protected)
        state = self._layers.get(layer)
        if state is None or n > state.residents:
            return None
        scores = self._scores(state)
        scores[[key.expert for key in protected if key.layer == layer and key.expert < self._width]] = math.inf
        best = [int(scores.argmin())] if n == 1 else scores.argsort(kind="stable")[:n].tolist()
        if scores[best[-1]] == math.inf:
            return None
        return [ExpertKey(layer, expert) for expert in best]

    def resident(self) -> set[ExpertKey]:
        return {
            ExpertKey(number, expert)
            for number, layer in self._layers.items()
            for expert in np.flatnonzero(layer.absent == 0).tolist()
        }

    def score(self, key: ExpertKey) -> float:
        """The foretold use of ``key`` (and infinity if it is not resident)."""
        return float(self._scores(self._layers[key.layer])[key.expert])

    def train(self, events: Events) -> None:
        """Learn from the events of other requests."""
        for number, experts in zip(events.layer.tolist(), events.sets(), strict=True):
            self.record_event([ExpertKey(number, expert) for expert in experts])

    def check_integrity(self) -> None:
        for layer in self._layers.values():
            assert layer.residents == int((layer.absent == 0).sum()), "residents are counted"
            assert np.isfinite(layer.table).all() and np.isfinite(layer.uses).all(), "nothing overflows"
            assert layer.table.nbytes * self._layer_count <= max(self._table_bytes, 0), "tables stay in their room"

    def _scores(self, layer: _Layer) -> NDArray[np.float64]:
        scores = layer.uses * (self._mix / layer.total if layer.total else 0.0)
        scores += layer.foretold
        scores += layer.absent
        return scores

    def _victims_of_all(self, n: int, protected: Collection[ExpertKey]) -> list[ExpertKey] | None:
        """The lowest scores of all layers: each layer's residents are sorted once for as long as nothing changes there."""
        heads = []
        for number, layer in self._layers.items():
            if layer.residents:
                if layer.order is None:
                    scores = self._scores(layer)
                    best = scores.argsort(kind="stable")[: layer.residents]
                    layer.order = list(zip(scores[best].tolist(), best.tolist(), strict=True))
                heads.append((*layer.order[0], number, 0))
        heapq.heapify(heads)
        chosen: list[ExpertKey] = []
        while heads and len(chosen) < n:
            _, expert, number, at = heads[0]
            key = ExpertKey(number, expert)
            if key not in protected:
                chosen.append(key)
            order = self._layers[number].order
            assert order is not None
            if at + 1 < len(order):
                heapq.heapreplace(heads, (*order[at + 1], number, at + 1))
            else:
                heapq.heappop(heads)
        return chosen if len(chosen) == n else None

    def _evidence_that_fits(self) -> int:
        """Kinds of evidence that the tables have room for: 3, 1 or 0."""
        table = 4 * self._width**2 * self._layer_count
        return next(kinds for kinds in (_EVIDENCE, 1, 0) if kinds * table <= self._table_bytes)

    def _grow(self, experts: int) -> None:
        """Make room for more experts a layer than were known of. Rows change their places, and rows that wait are dropped."""
        old, kinds = self._width, self._evidence
        self._width = -(-experts // _STEP) * _STEP
        self._evidence = min(kinds, self._evidence_that_fits())
        more = self._width - old
        for layer in self._layers.values():
            table = layer.table.reshape(kinds, old, old)[: self._evidence]
            layer.table = np.pad(table, ((0, 0), (0, more), (0, more))).reshape(-1, self._width)
            layer.uses = np.pad(layer.uses, (0, more))
            layer.foretold = np.pad(layer.foretold, (0, more))
            layer.absent = np.pad(layer.absent, (0, more), constant_values=math.inf)
            layer.rows = layer.order = None
