"""Slow, obvious policies that the fast ones must equal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from cache.events import Events
from cache.keys import ExpertKey
from tests.cache.reference_base import Keys, Ordered, Reference
from tests.cache.reference_queues import ARC, S3FIFO, SLRU, Random, Sieve


class LRU(Ordered):
    def __init__(self) -> None:
        super().__init__()
        self.clock = 0
        self.used: dict[ExpertKey, int] = {}

    def event(self, keys: Keys) -> None:
        self.clock += 1
        for key in keys:
            self.used[key] = self.clock

    def admitted(self, key: ExpertKey) -> None:
        self.used[key] = self.clock  # a prefetch counts as just used

    def rank(self, key: ExpertKey) -> Any:
        return self.used[key], self.residents.index(key)


class Touched(Ordered):
    """Ties of a score go to the key whose score was set first."""

    def __init__(self) -> None:
        super().__init__()
        self.ticks = 0
        self.touched: dict[ExpertKey, int] = {}

    def touch(self, key: ExpertKey) -> None:
        self.ticks += 1
        self.touched[key] = self.ticks

    def event(self, keys: Keys) -> None:
        self.count(keys)
        for key in keys:
            if key in self.residents:
                self.touch(key)

    def count(self, keys: Keys) -> None:
        pass

    def admitted(self, key: ExpertKey) -> None:
        self.touch(key)

    def score(self, key: ExpertKey) -> float:
        raise NotImplementedError

    def rank(self, key: ExpertKey) -> Any:
        return self.score(key), self.touched[key]


class LFU(Touched):
    def __init__(self) -> None:
        super().__init__()
        self.uses: Counter[ExpertKey] = Counter()

    def count(self, keys: Keys) -> None:
        self.uses.update(keys)

    def score(self, key: ExpertKey) -> float:
        return self.uses[key]


class Static(Touched):
    def __init__(self, training: Events) -> None:
        super().__init__()
        self.uses = Counter(
            ExpertKey(layer, expert)
            for layer, experts in zip(training.layer.tolist(), training.sets(), strict=True)
            for expert in experts
        )

    def score(self, key: ExpertKey) -> float:
        return self.uses[key]


class EWMA(Touched):
    """Exact rational weights would be best; the history as a list of times is near enough to never tie by chance."""

    def __init__(self, half_life: float = 16.0) -> None:
        super().__init__()
        self.half_life = half_life
        self.clock: Counter[int] = Counter()
        self.times: dict[ExpertKey, list[int]] = {}

    def count(self, keys: Keys) -> None:
        for layer in {key.layer for key in keys}:
            self.clock[layer] += 1
        for key in keys:
            self.times.setdefault(key, []).append(self.clock[key.layer])

    def score(self, key: ExpertKey) -> float:
        times = self.times.get(key)
        if not times:
            return -math.inf
        return round(math.log2(sum(2 ** (time / self.half_life) for time in times)), 9)


class LeastStale(LRU):
    def __init__(self) -> None:
        super().__init__()
        self.passes = 0
        self.layer = -1
        self.now: list[ExpertKey] = []
        self.touched: dict[ExpertKey, tuple[int, bool]] = {}  # pass, and whether an event used it

    def event(self, keys: Keys) -> None:
        if keys:
            if keys[0].layer <= self.layer:
                self.passes += 1
            self.layer = keys[0].layer
        self.now = list(keys)
        super().event(keys)
        for key in keys:
            self.touched[key] = self.passes, True

    def admitted(self, key: ExpertKey) -> None:
        super().admitted(key)
        self.touched[key] = self.passes, key in self.now

    def rank(self, key: ExpertKey) -> Any:
        touched, used = self.touched[key]
        if touched == self.passes:
            return self.passes, 0 if used else 1, self.used[key], self.residents.index(key)
        return touched, 1 if used else 0, self.used[key], self.residents.index(key)


class Foresight(Ordered):
    """The rule in dictionaries: one float32 at a time, in the order in which the arrays add."""

    def __init__(self, half_life: float = 16.0, mix: float = 0.5, rate: float = 0.15) -> None:
        super().__init__()
        self.growth, self.mix, self.rate = 2 ** (1 / half_life), mix, rate
        self.table: dict[tuple[int, int], dict[int, np.float32]] = {}
        self.uses: dict[int, dict[int, float]] = {}
        self.weight: dict[int, float] = {}
        self.total: dict[int, float] = {}
        self.evidence: dict[int, list[tuple[int, int]]] = {}
        self.foretold: dict[int, dict[int, np.float32]] = {}
        self.seen: list[int] = []

    def event(self, keys: Keys) -> None:
        if not keys:
            return
        layer, chosen = keys[0].layer, [key.expert for key in keys]
        evidence = [(layer, expert) for expert in chosen[:4]]
        now: dict[int, np.float32] = {}
        share = np.float32(1 / len(evidence))
        for expert in range(64):
            total = np.float32(0)
            for row in evidence:
                total += self.table.get(row, {}).get(expert, np.float32(0))
            now[expert] = total * share
        if layer in self.evidence:
            residents = sum(key.layer == layer for key in self.residents)
            gamma = max(0.0, 1.0 - len(chosen) / residents) if residents else 0.5
            for expert in range(64):
                error = now[expert] * np.float32(gamma) - self.foretold[layer][expert]
                if expert in chosen:
                    error += np.float32(1 - gamma)
                error *= np.float32(self.rate)
                for row in self.evidence[layer]:
                    old = self.table.setdefault(row, {}).get(expert, np.float32(0))
                    self.table[row][expert] = old + error
        self.evidence[layer], self.foretold[layer] = evidence, now
        self.weight[layer] = self.weight.get(layer, 1.0) * self.growth
        self.total[layer] = self.total.get(layer, 0.0) + self.weight[layer]
        uses = self.uses.setdefault(layer, {})
        for expert in chosen:
            uses[expert] = uses.get(expert, 0.0) + self.weight[layer]
        if layer not in self.seen:
            self.seen.append(layer)

    def admitted(self, key: ExpertKey) -> None:
        if key.layer not in self.seen:
            self.seen.append(key.layer)

    def rank(self, key: ExpertKey) -> Any:
        total = self.total.get(key.layer)
        score = self.uses.get(key.layer, {}).get(key.expert, 0.0) * (self.mix / total if total else 0.0)
        score += float(self.foretold.get(key.layer, {}).get(key.expert, np.float32(0)))
        return score, self.seen.index(key.layer), key.expert


REFERENCES: dict[str, Callable[[int, Events], Reference]] = {
    "lru": lambda seed, training: LRU(),
    "lfu": lambda seed, training: LFU(),
    "ewma": lambda seed, training: EWMA(),
    "slru": lambda seed, training: SLRU(),
    "s3fifo": lambda seed, training: S3FIFO(),
    "sieve": lambda seed, training: Sieve(),
    "arc": lambda seed, training: ARC(),
    "least-stale": lambda seed, training: LeastStale(),
    "static": lambda seed, training: Static(training),
    "random": lambda seed, training: Random(seed),
    "foresight": lambda seed, training: Foresight(),
}
