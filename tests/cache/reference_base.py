"""The ground that slow, obvious policies stand on: lists, whole-cache scans, and algorithms run on copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from cache.keys import ExpertKey

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
