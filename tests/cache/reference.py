"""Slow, obvious policies that the fast ones must equal: lists, whole-cache scans, and algorithms run on copies."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cache.events import Events
from cache.keys import ExpertKey
from cache.policies.random import mix

Keys = Sequence[ExpertKey]
Barred = Callable[[ExpertKey], bool]


class Reference:
    """Keeps the residents in the order of their admission and runs :meth:`choose` on a copy of itself.

    ``choose`` may change that copy as its algorithm does; when a victim is evicted, the copy as it was after choosing
    that victim becomes the policy.
    """

    def __init__(self) -> None:
        self.residents: list[ExpertKey] = []
        self.plan: list[tuple[ExpertKey, dict[str, Any]]] = []

    def choose(self, barred: Barred) -> ExpertKey | None:
        raise NotImplementedError

    def event(self, keys: Keys) -> None:
        pass

    def admitted(self, key: ExpertKey) -> None:
        pass

    def gone(self, key: ExpertKey) -> None:
        pass

    def record_event(self, keys: Keys) -> None:
        self.event(keys)

    def admit(self, key: ExpertKey) -> None:
        self.residents.append(key)
        self.admitted(key)

    def evict(self, key: ExpertKey) -> None:
        if self.plan and self.plan[0][0] == key:
            plan = self.plan[1:]
            self.__dict__.update(self.plan[0][1])
            self.plan = plan
        self.drop(key)

    def drop(self, key: ExpertKey) -> None:
        self.residents.remove(key)
        self.gone(key)

    def victims(self, n: int, protected: Sequence[ExpertKey]) -> list[ExpertKey] | None:
        work = copy.deepcopy(self)
        work.plan = []
        chosen: list[ExpertKey] = []
        plan = []
        while len(chosen) < n:
            key = work.choose(lambda key: key in protected or key in chosen)
            if key is None:
                return None
            after = copy.deepcopy(work)
            for earlier in chosen:  # still in the copy's lists; by then they are evicted
                after.drop(earlier)
            plan.append((key, after.__dict__))
            chosen.append(key)
        self.plan = plan
        return chosen


class Ordered(Reference):
    """The victim has the least :meth:`rank`."""

    def rank(self, key: ExpertKey) -> Any:
        raise NotImplementedError

    def choose(self, barred: Barred) -> ExpertKey | None:
        return min((key for key in self.residents if not barred(key)), key=self.rank, default=None)


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


class SLRU(Reference):
    def __init__(self) -> None:
        super().__init__()
        self.probation: list[ExpertKey] = []
        self.protected: list[ExpertKey] = []

    def event(self, keys: Keys) -> None:
        for key in keys:
            for segment in (self.probation, self.protected):
                if key in segment:
                    segment.remove(key)
                    self.protected.append(key)
                    break
        while len(self.protected) > int(0.8 * len(self.residents)):
            self.probation.append(self.protected.pop(0))

    def admitted(self, key: ExpertKey) -> None:
        self.probation.append(key)

    def gone(self, key: ExpertKey) -> None:
        (self.probation if key in self.probation else self.protected).remove(key)

    def choose(self, barred: Barred) -> ExpertKey | None:
        return next((key for key in self.probation + self.protected if not barred(key)), None)


class Sieve(Reference):
    """The queue as one list, the hand as an index into it."""

    def __init__(self) -> None:
        super().__init__()
        self.hand = 0
        self.used: dict[ExpertKey, bool] = {}

    def event(self, keys: Keys) -> None:
        for key in keys:
            if key in self.residents:
                self.used[key] = True

    def admitted(self, key: ExpertKey) -> None:
        self.used[key] = False

    def drop(self, key: ExpertKey) -> None:
        self.hand -= self.residents.index(key) < self.hand
        super().drop(key)
        self.hand = self.hand if self.hand < len(self.residents) else 0

    def choose(self, barred: Barred) -> ExpertKey | None:
        for _ in range(2 * len(self.residents)):
            self.hand %= len(self.residents)  # at the end of the queue it starts again
            key = self.residents[self.hand]
            if not barred(key) and not self.used[key]:
                return key
            if not barred(key):
                self.used[key] = False
            self.hand += 1
        return None


class S3FIFO(Reference):
    def __init__(self) -> None:
        super().__init__()
        self.small: list[ExpertKey] = []
        self.main: list[ExpertKey] = []
        self.ghosts: list[ExpertKey] = []
        self.uses: dict[ExpertKey, int] = {}

    def event(self, keys: Keys) -> None:
        for key in keys:
            if key in self.residents:
                self.uses[key] = min(3, self.uses[key] + 1)

    def admitted(self, key: ExpertKey) -> None:
        self.uses[key] = 0
        if key in self.ghosts:
            self.ghosts.remove(key)
            self.main.append(key)
        else:
            self.small.append(key)

    def gone(self, key: ExpertKey) -> None:
        if key in self.main:
            self.main.remove(key)
        else:
            self.small.remove(key)
            self.ghosts.append(key)
            while len(self.ghosts) > len(self.small) + len(self.main) + 1:
                self.ghosts.pop(0)

    def victims(self, n: int, protected: Sequence[ExpertKey]) -> list[ExpertKey] | None:
        self.size = len(self.residents)  # of one search
        return super().victims(n, protected)

    def choose(self, barred: Barred) -> ExpertKey | None:
        while any(not barred(key) for key in self.residents):
            # victims of the same search are barred, but no longer count
            in_small = len([key for key in self.small if key not in self.chosen(barred)])
            small = [key for key in self.small if not barred(key)]
            main = [key for key in self.main if not barred(key)]
            if small and (in_small >= 0.1 * self.size or not main):
                key = small[0]
                if self.uses[key] <= 1:
                    return key
                self.small.remove(key)
                self.main.append(key)
                self.uses[key] = 0
            else:
                key = main[0]
                if self.uses[key] == 0:
                    return key
                self.main.remove(key)
                self.main.append(key)
                self.uses[key] -= 1
        return None

    def chosen(self, barred: Barred) -> list[ExpertKey]:
        """The victims of this search so far: what the closure of ``victims`` knows."""
        names = barred.__code__.co_freevars
        cells: dict[str, Any] = {
            name: cell.cell_contents for name, cell in zip(names, barred.__closure__ or (), strict=True)
        }
        found: list[ExpertKey] = cells["chosen"]
        return found


class ARC(Reference):
    def __init__(self) -> None:
        super().__init__()
        self.once: list[ExpertKey] = []
        self.again: list[ExpertKey] = []
        self.left_once: list[ExpertKey] = []
        self.left_again: list[ExpertKey] = []
        self.border = 0.0

    def event(self, keys: Keys) -> None:
        for key in keys:
            if key in self.residents:
                (self.once if key in self.once else self.again).remove(key)
                self.again.append(key)
            elif key in self.left_once:
                step = max(1, len(self.left_again) / len(self.left_once))
                self.border = min(len(self.residents), self.border + step)
            elif key in self.left_again:
                self.border = max(0, self.border - max(1, len(self.left_once) / len(self.left_again)))

    def admitted(self, key: ExpertKey) -> None:
        known = key in self.left_once + self.left_again
        for ghosts in (self.left_once, self.left_again):
            if key in ghosts:
                ghosts.remove(key)
        (self.again if known else self.once).append(key)

    def gone(self, key: ExpertKey) -> None:
        size = len(self.once) + len(self.again)
        source, ghosts = (self.once, self.left_once) if key in self.once else (self.again, self.left_again)
        source.remove(key)
        ghosts.append(key)
        while self.left_once and len(self.once) + len(self.left_once) > size:
            self.left_once.pop(0)
        while self.left_again and sum(map(len, (self.once, self.again, self.left_once, self.left_again))) > 2 * size:
            self.left_again.pop(0)

    def victims(self, n: int, protected: Sequence[ExpertKey]) -> list[ExpertKey] | None:
        length = len(self.once)
        once = [key for key in self.once if key not in protected]
        again = [key for key in self.again if key not in protected]
        chosen: list[ExpertKey] = []
        while len(chosen) < n:
            if once and (length > self.border or not again):
                chosen.append(once.pop(0))
                length -= 1
            elif again:
                chosen.append(again.pop(0))
            else:
                return None
        return chosen


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


class Random(Reference):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = mix(seed)
        self.evictions = 0
        self.places: list[ExpertKey] = []

    def admitted(self, key: ExpertKey) -> None:
        self.places.append(key)

    def gone(self, key: ExpertKey) -> None:
        self.evictions += 1
        last = self.places.pop()
        if last != key:
            self.places[self.places.index(key)] = last

    def victims(self, n: int, protected: Sequence[ExpertKey]) -> list[ExpertKey] | None:
        free = [key for key in self.places if key not in protected]
        if len(free) < n:
            return None
        draws = [mix(self.seed ^ mix((self.evictions << 16) + draw)) for draw in range(16 * n)]
        wanted = [self.places[draw % len(self.places)] for draw in draws] if self.places else []
        return list(dict.fromkeys([key for key in wanted if key in free] + free))[:n]


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
