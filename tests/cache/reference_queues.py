"""The slow references of the policies that keep queues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cache.keys import ExpertKey
from cache.policies.random import mix
from tests.cache.reference_base import Barred, Keys, Reference


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
