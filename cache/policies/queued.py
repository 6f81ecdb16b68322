"""Shared ground of the policies whose search for a victim moves or changes other keys on its way."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from cache.keys import ExpertKey
from cache.policies.base import Policy


class Step(NamedTuple):
    """``key`` is a victim, or the search goes past it with a ``change`` that the policy knows."""

    key: ExpertKey
    change: str | None = None


Skip = Callable[[ExpertKey], bool]


class QueuedPolicy(Policy):
    """Searches without changing anything, and carries the search out when its victims go.

    :meth:`victims` keeps the steps of the search. When one of its victims is evicted, the changes before it are made.
    An eviction that was not asked for (a failed load) makes none.
    """

    def __init__(self) -> None:
        self._plan: list[Step] = []

    @abstractmethod
    def search(self, skip: Skip) -> Iterator[Step]:
        """The steps from here on, as long as there are keys for which ``skip`` is false. Changes nothing."""

    @abstractmethod
    def change(self, step: Step) -> None:
        """Make the change of a step that is no victim."""

    @abstractmethod
    def remove(self, key: ExpertKey) -> None:
        """``key`` is no longer resident."""

    def victims(self, n: int, protected: Collection[ExpertKey], layer: int | None = None) -> list[ExpertKey] | None:
        chosen: list[ExpertKey] = []
        plan: list[Step] = []
        if n > 0:
            for step in self.search(lambda key: key in protected or (layer is not None and key.layer != layer)):
                plan.append(step)
                if step.change is None:
                    chosen.append(step.key)
                    if len(chosen) == n:
                        break
            else:
                return None
        self._plan = plan
        return chosen

    def evict(self, key: ExpertKey) -> None:
        victim = Step(key)
        if victim in self._plan:
            at = self._plan.index(victim)
            before, self._plan = self._plan[:at], self._plan[at + 1 :]
            for step in before:
                if step.change is not None:
                    self.change(step)
        self.remove(key)
