"""The contract of an eviction policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from cache.events import Events
from cache.keys import ExpertKey


class PolicyError(ValueError):
    """A policy name or parameter that does not exist; the message says which do."""


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy may be given beside its parameters.

    ``layer`` is the only layer that it will see, under the scope ``layer``. ``layers`` is how many MoE layers there are
    and ``experts`` the most that one of them has (0: not known). ``future`` are the events to come (simulation only),
    ``training`` earlier ones to learn from.
    """

    scope: str = "global"
    seed: int = 0
    layer: int | None = None
    layers: int = 0
    experts: int = 0
    future: Events | None = None
    training: Events | None = None


class Policy(ABC):
    """Decides which resident records to give up. Sees events and keys, never bytes, slots or time.

    The cache tells it of every event (:meth:`record_event`), of every key that takes a slot (:meth:`admit`) and of
    every key that loses it (:meth:`evict`). It asks with :meth:`victims`, which changes nothing. A policy is
    deterministic and costs O(log n) or better per access.
    """

    name: ClassVar[str]
    simulation_only: ClassVar[bool] = False
    """Needs to know the future: replay and tune only."""
    all_layers: ClassVar[bool] = False
    """One object sees all layers also under the scope ``layer``, and honours the ``layer`` argument itself."""
    learns: ClassVar[bool] = False
    """Can learn beforehand, from :attr:`PolicyContext.training`."""
    takes: ClassVar[str | None] = None
    """The name of what follows ``NAME:`` where that is no list of parameters, such as a file."""

    @classmethod
    def create(cls, context: PolicyContext, **values: Any) -> Policy:
        """A fresh policy with these parameters. Raises PolicyError for values that make no sense."""
        return cls(**values)

    @abstractmethod
    def record_event(self, keys: Sequence[ExpertKey]) -> None:
        """One event: the distinct experts that one forward pass of one layer selects, resident or not."""

    @abstractmethod
    def admit(self, key: ExpertKey) -> None:
        """``key`` takes a slot. It must not be resident."""

    @abstractmethod
    def evict(self, key: ExpertKey) -> None:
        """``key`` loses its slot, as a victim or because its load failed. It must be resident."""

    @abstractmethod
    def victims(self, n: int, protected: Collection[ExpertKey], layer: int | None = None) -> list[ExpertKey] | None:
        """Exactly ``n`` distinct resident keys outside ``protected``, best victim first, or None if there are fewer.

        ``layer`` restricts the choice to that layer. Changes no state that a caller could notice. ``protected`` is
        a set or another collection with a fast ``in``.
        """

    def cold(self, n: int, protected: Collection[ExpertKey] = (), layer: int | None = None) -> list[ExpertKey]:
        """At most ``n`` resident keys outside ``protected`` that a prefetch may displace, coldest first.

        ``layer`` as in :meth:`victims`. Changes nothing.
        """
        while n > 0:
            keys = self.victims(n, protected, layer)
            if keys is not None:
                return keys
            n -= 1
        return []

    @abstractmethod
    def resident(self) -> set[ExpertKey]:
        """The keys that were admitted and not evicted since."""

    def score_now(self, key: ExpertKey) -> float | None:
        """What the policy holds of ``key`` at this moment, for people to look at: the lowest of the residents goes
        first. None if it keeps no such figure, or none of this key.

        Other threads may call it; it may give the figure of a moment before.
        """
        return None

    def check_integrity(self) -> None:  # noqa: B027 - a policy without inner structures has nothing to check
        """Assert that the policy's own structures agree with each other. For tests."""
