"""Foresight: the next use of an expert, learned from the experts that its layer has just used."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache.events import Events
from cache.keys import ExpertKey
from cache.policies.base import Policy, PolicyContext, PolicyError

_STEP = 32  # experts that tables grow by
_RESCALE = 1e200
_GAMMA_BEFOREHAND = 0.5  # while nothing is resident, as in training


class _Foretold(NamedTuple):
    """One event: the rows of the table of its experts, of those that foretold, and the uses foretold, float32[E]."""

    used: NDArray[np.intp]
    rows: NDArray[np.intp]
    uses: NDArray[np.float32]


class Foresight(Policy):
    """Gives up the record with the lowest foretold use: a learned part, and the share of recent events that used it.

    The learned part: each expert of a layer has a row in the layer's table, and the mean of the rows of an event's
    first ``evidence`` experts by rank foretells the uses of all experts of the layer, later ones for less. An event
    counts ``gamma`` times the one before it, where ``gamma`` is 1 minus the share of the layer's residents that one
    event takes: the horizon is about the time that a record can stay. The rows learn by temporal differences: what
    was foretold an event ago moves by ``rate`` of its error towards what happened and what is foretold now. The other
    part is the decayed count of ``ewma`` as a share of events, times ``mix``; with an empty table only that is left.

    The tables take 4 E^2 bytes a layer (E experts); if that is more than ``table_mib`` in all there are none, and
    this is ``ewma``. Learning waits until the forward pass is through and is done for all layers at once, which
    changes no result: a layer's table is next used in the next pass.

    Sources: Sutton, "Learning to predict by the methods of temporal differences", Machine Learning 3, 1988; Dayan,
    "Improving generalization for temporal difference learning: the successor representation", Neural Computation 5(4),
    1993. To use them for experts is ours; docs/cache.md tells what else was tried.
    """

    name = "foresight"
    learns = True
    all_layers = True

    def __init__(
        self,
        layers: int = 0,
        experts: int = 0,
        *,
        half_life: float = 16.0,
        mix: float = 0.5,
        rate: float = 0.15,
        evidence: int = 4,
        table_mib: float = 16.0,
    ) -> None:
        for name, value, top in (("half_life", half_life, math.inf), ("mix", mix, math.inf), ("rate", rate, 1.0)):
            if not (0 < value <= top and math.isfinite(value)):
                limit = " and at most 1" if top == 1 else ""
                raise PolicyError(f"foresight: {name} must be above 0{limit}, not {value}")
        if evidence < 1:
            raise PolicyError(f"foresight: evidence must be at least 1, not {evidence}")
        if not 0 <= table_mib < 2**20:
            raise PolicyError(f"foresight: table_mib must be at least 0, not {table_mib}")
        self._growth = 2.0 ** (1 / half_life)
        self._mix, self._rate, self._evidence = mix, rate, evidence
        self._table_bytes = int(table_mib * 2**20)
        self._index: dict[int, int] = {}  # layer -> row of the arrays below
        self._numbers: list[int] = []
        self._weight: list[float] = []  # of a use in the layer's next event; grows instead of letting old uses decay
        self._total: list[float] = []  # of all events so far
        self._residents: list[int] = []
        self._last: list[_Foretold | None] = []
        self._waiting: dict[int, tuple[_Foretold, _Foretold, float]] = {}  # what is to be learned: before, now, gamma
        self._stale: set[int] = set()  # layers whose scores have changed
        self._make_arrays(layers or 8, -(-max(1, experts) // _STEP) * _STEP)

    @classmethod
    def create(cls, context: PolicyContext, **values: Any) -> Foresight:
        policy = cls(context.layers, context.experts, **values)
        if context.training is not None:
            policy.train(context.training)
        return policy

    def record_event(self, keys: Sequence[ExpertKey]) -> None:
        if not keys:
            return
        experts = [key[1] for key in keys]
        if max(experts) >= self._width:
            self._grow(len(self._uses), max(experts) + 1)
        at = self._row_of(keys[0][0])
        base = at * self._width
        rows = np.array([base + expert for expert in experts])
        if self._table is not None:
            self._foretell(at, rows)
        weight = self._weight[at] = self._weight[at] * self._growth
        self._total[at] += weight
        self._flat_uses[rows] += weight
        if weight > _RESCALE:
            self._uses[at] /= weight
            self._total[at] /= weight
            self._weight[at] = 1.0
        self._stale.add(at)

    def admit(self, key: ExpertKey) -> None:
        if key.expert >= self._width:
            self._grow(len(self._uses), key.expert + 1)
        at = self._row_of(key.layer)
        self._absent[at, key.expert] = 0.0
        self._residents[at] += 1
        self._stale.add(at)

    def evict(self, key: ExpertKey) -> None:
        at = self._index[key.layer]
        self._absent[at, key.expert] = math.inf
        self._residents[at] -= 1
        if at not in self._stale:
            self._scores[at, key.expert] = math.inf
            self._find_lowest(at)

    def victims(self, n: int, protected: Collection[ExpertKey], layer: int | None = None) -> list[ExpertKey] | None:
        if n <= 0:
            return []
        if layer is None:
            return self._victims_of_all(n, protected)
        at = self._index.get(layer)
        if at is None or n > self._residents[at]:
            return None
        scores = self._scores_of(at)
        chosen: list[ExpertKey] = []
        while len(chosen) < n:
            expert = scores.argmin()
            if scores[expert] == math.inf:
                return None
            scores[expert] = math.inf
            key = ExpertKey(layer, int(expert))
            if key not in protected:  # what an event has just used is seldom the lowest
                chosen.append(key)
        return chosen

    def resident(self) -> set[ExpertKey]:
        rows, experts = np.nonzero(self._absent == 0)
        return {
            ExpertKey(self._numbers[at], expert) for at, expert in zip(rows.tolist(), experts.tolist(), strict=True)
        }

    def score_now(self, key: ExpertKey) -> float | None:
        """The foretold uses of the key, resident or not."""
        at, uses = self._index.get(key.layer), self._uses
        if at is None or at >= len(uses) or key.expert >= uses.shape[1]:
            return None
        total, last = self._total[at], self._last[at]
        score = float(uses[at, key.expert]) * (self._mix / total if total else 0.0)
        if last is not None and key.expert < len(last.uses):
            score += float(last.uses[key.expert])
        return score

    def train(self, events: Events) -> None:
        """Learn from the events of other requests."""
        for number, experts in zip(events.layer.tolist(), events.sets(), strict=True):
            self.record_event([ExpertKey(number, expert) for expert in experts])

    def check_integrity(self) -> None:
        assert self._residents == (self._absent == 0).sum(1).tolist()[: len(self._numbers)], "residents are counted"
        assert np.isfinite(self._uses).all(), "nothing overflows"
        assert self._table is None or self._table.nbytes <= self._table_bytes, "the tables stay in their room"
        for at in set(range(len(self._numbers))) - self._stale:
            assert np.array_equal(self._scores[at], self._scores_of(at)), "scores that nothing changed are right"
            assert self._lowest[at] == self._scores[at].min(), "and the lowest is known"

    def _foretell(self, at: int, used: NDArray[np.intp]) -> None:
        if at in self._waiting:
            self._learn()
        assert self._table is not None
        rows = used[: self._evidence]
        uses = np.add.reduce(self._table.take(rows, 0), 0)
        uses *= np.float32(1 / len(rows))
        now, before = _Foretold(used, rows, uses), self._last[at]
        if before is not None:
            residents = self._residents[at]
            gamma = max(0.0, 1.0 - len(used) / residents) if residents else _GAMMA_BEFOREHAND
            self._waiting[at] = before, now, gamma
        self._last[at] = now

    def _learn(self) -> None:
        """Move what the events before foretold towards what has become of it: one event of each layer that waits."""
        assert self._table is not None
        before, now, gammas = zip(*self._waiting.values(), strict=True)
        gamma = np.array(gammas)
        error = np.array([foretold.uses for foretold in now])
        error *= gamma.astype(np.float32)[:, None]
        error -= np.array([foretold.uses for foretold in before])
        counts = [len(foretold.used) for foretold in now]
        places = (np.arange(len(now)) - list(self._waiting)) * self._width  # from rows of the table to those of error
        used = np.concatenate([foretold.used for foretold in now]) + np.repeat(places, counts)
        error.reshape(-1)[used] += np.repeat((1 - gamma).astype(np.float32), counts)
        error *= np.float32(self._rate)
        rows = np.concatenate([foretold.rows for foretold in before])
        self._table[rows] += np.repeat(error, [len(foretold.rows) for foretold in before], axis=0)
        self._waiting.clear()

    def _scores_of(self, at: int) -> NDArray[np.float64]:
        """Foretold uses of the residents of a layer, [E]; infinity for all others."""
        total, last = self._total[at], self._last[at]
        scores: NDArray[np.float64] = self._uses[at] * (self._mix / total if total else 0.0)
        if last is not None:
            scores += last.uses
        scores += self._absent[at]
        return scores

    def _victims_of_all(self, n: int, protected: Collection[ExpertKey]) -> list[ExpertKey] | None:
        """The lowest scores of all layers, of equals the lowest expert of the lowest layer seen first.

        Each layer's lowest score is known as long as nothing changes there, so only changed layers are looked through.
        """
        for at in self._stale:
            self._scores[at] = self._scores_of(at)
            self._find_lowest(at)
        self._stale.clear()
        chosen: list[ExpertKey] = []
        taken: list[tuple[int, int, float]] = []  # to be put back
        while len(chosen) < n:
            at = int(self._lowest.argmin())
            score = float(self._lowest[at])
            if score == math.inf:
                break
            expert = int(self._coldest[at])
            taken.append((at, expert, score))
            self._scores[at, expert] = math.inf
            self._find_lowest(at)
            key = ExpertKey(self._numbers[at], expert)
            if key not in protected:
                chosen.append(key)
        for at, expert, score in reversed(taken):
            self._scores[at, expert] = self._lowest[at] = score
            self._coldest[at] = expert
        return chosen if len(chosen) == n else None

    def _find_lowest(self, at: int) -> None:
        scores = self._scores[at]
        expert = scores.argmin()
        self._coldest[at] = expert
        self._lowest[at] = scores[expert]

    def _row_of(self, layer: int) -> int:
        at = self._index.get(layer)
        if at is None:
            at = self._index[layer] = len(self._numbers)
            self._numbers.append(layer)
            self._weight.append(1.0)
            self._total.append(0.0)
            self._residents.append(0)
            self._last.append(None)
            if at >= len(self._uses):
                self._grow(2 * at, self._width)
        return at

    def _make_arrays(self, layers: int, width: int) -> None:
        self._width = width
        self._uses = np.zeros((layers, width))
        self._absent = np.full((layers, width), math.inf)
        self._scores = np.full((layers, width), math.inf)
        self._lowest = np.full(layers, math.inf)
        self._coldest = np.zeros(layers, np.int64)
        fits = 4 * layers * width**2 <= self._table_bytes
        self._table: NDArray[np.float32] | None = np.zeros((layers * width, width), np.float32) if fits else None
        self._flat_uses = self._uses.reshape(-1)

    def _grow(self, layers: int, experts: int) -> None:
        """Make room for layers and experts that were not known of. What the last events foretold is dropped."""
        if self._waiting:
            self._learn()
        uses, absent, table, (old_layers, old) = self._uses, self._absent, self._table, self._uses.shape
        self._make_arrays(layers, -(-experts // _STEP) * _STEP)
        self._uses[:old_layers, :old] = uses
        self._absent[:old_layers, :old] = absent
        if self._table is not None and table is not None:
            room = self._table.reshape(layers, self._width, self._width)
            room[:old_layers, :old, :old] = table.reshape(old_layers, old, old)
        self._last = [None] * len(self._last)
        self._stale = set(range(len(self._numbers)))
