"""The log of a run's cache: every call in its order, to be replayed without the run.

With prefetches a trace is not enough to repeat a run's counts, since they depend on when reads ended. The log has that:
``--cache-log FILE`` writes it, and ``python -m cache.cache_log FILE`` carries it out again on a fresh cache, and tells
whether every slot, victim and count is the same.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache.events import Events
from cache.expert_cache import CacheCounters, ExpertCache, Lookup, Reservation
from cache.keys import ExpertKey
from cache.policies import Policy, PolicyContext, PolicyError, make_policy
from cache.shares import even_share


class CacheLogError(ValueError):
    """A file that is no log, or a log that the cache does not repeat; the message is one line."""


@dataclass(frozen=True, slots=True)
class CacheSetup:
    """What a cache is made of. ``layers`` are the MoE layers' numbers, ``experts`` the most that one has."""

    policy: str
    scope: str
    slots: int
    layers: tuple[int, ...]
    experts: int
    seed: int = 0

    def make_policy(self, training: Events | None = None) -> Policy:
        """``training`` are earlier events to learn from. Raises PolicyError."""
        context = PolicyContext(self.scope, self.seed, layers=len(self.layers), experts=self.experts, training=training)
        return make_policy(self.policy, context)

    @property
    def fill(self) -> int:
        """The ``fill`` argument of a cache: an even share of the slots."""
        return even_share(self.slots, len(self.layers))

    @property
    def records(self) -> int:
        """The ``records`` argument of a cache."""
        return len(self.layers) * self.experts

    def shared_layers(self) -> tuple[int, ...] | None:
        """The ``layers`` argument of a cache of this scope."""
        return self.layers if self.scope == "layer" else None


class LoggedCache(ExpertCache):
    """An expert cache that writes down what it is told and what it answers. The plain one does not pay for it."""

    def __init__(self, setup: CacheSetup) -> None:
        super().__init__(setup.slots, setup.make_policy(), setup.shared_layers(), setup.fill, setup.records)
        self.log: list[tuple[Any, ...]] = [("setup", asdict(setup))]

    def lookup(
        self,
        layer: int,
        experts: Iterable[int],
        *,
        decode: bool = True,
        recent: Sequence[Sequence[int]] | None = None,
    ) -> Lookup:
        experts = list(experts)
        found = super().lookup(layer, experts, decode=decode, recent=recent)
        self.log.append(("lookup", layer, experts, decode, recent, [len(part) for part in found]))
        return found

    def reserve(self, keys: Sequence[ExpertKey], limit: int | None = None) -> list[Reservation]:
        found = super().reserve(keys, limit)
        self.log.append(("reserve", list(keys), limit, found))
        return found

    def reserve_ahead(
        self, keys: Sequence[ExpertKey], repays: Callable[[ExpertKey, ExpertKey], bool] | None = None
    ) -> list[Reservation]:
        answers: list[bool] = []

        def logged(key: ExpertKey, victim: ExpertKey) -> bool:
            assert repays is not None
            answers.append(repays(key, victim))
            return answers[-1]

        found = super().reserve_ahead(keys, None if repays is None else logged)
        self.log.append(("reserve_ahead", list(keys), found, None if repays is None else answers))
        return found

    def reserve_next(self, keys: Sequence[ExpertKey]) -> list[Reservation]:
        found = super().reserve_next(keys)
        self.log.append(("reserve_next", list(keys), found))
        return found

    def commit(self, key: ExpertKey) -> None:
        super().commit(key)
        self.log.append(("commit", key))

    def abandon(self, key: ExpertKey) -> None:
        super().abandon(key)
        self.log.append(("abandon", key))

    def release(self, key: ExpertKey) -> None:
        super().release(key)
        self.log.append(("release", key))

    def end_event(self) -> None:
        super().end_event()
        self.log.append(("end_event",))

    def clear(self) -> None:
        super().clear()
        self.log.append(("clear",))

    def retire(self, wanted: int, segment: int = 1) -> list[int]:
        gone = super().retire(wanted, segment)
        self.log.append(("retire", wanted, segment, gone))
        return gone

    def grow(self, slots: Iterable[int]) -> None:
        slots = list(slots)
        super().grow(slots)
        self.log.append(("grow", slots))

    def change_setup(self, setup: CacheSetup) -> None:
        """:meth:`change_policy` in a form that can be repeated."""
        self.change_policy(setup.make_policy(), setup.shared_layers())
        self.log.append(("change", asdict(setup)))

    def save(self, path: Path) -> None:
        """Write one JSON array a line, atomically. Raises OSError."""
        partial = path.with_name(f".{path.name}.partial")
        try:
            with open(partial, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in [*self.log, ("counters", asdict(self.counters))])
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def load_log(path: Path) -> Iterator[list[Any]]:
    """The entries that :meth:`LoggedCache.save` wrote. Raises CacheLogError."""
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                if not (isinstance(entry, list) and entry and isinstance(entry[0], str)):
                    raise ValueError("an entry is no list")
                yield entry
    except (OSError, ValueError) as error:
        raise CacheLogError(f"{path}: not a cache log ({error})") from error


def replay_log(entries: Iterable[Sequence[Any]]) -> CacheCounters:
    """Carry a log out again on a fresh cache; returns its counters.

    Raises CacheLogError at the first answer that differs, for calls that there are not, and for a log without an end.
    """
    cache: ExpertCache | None = None
    for number, (name, *arguments) in enumerate(entries, 1):
        try:
            if name == "setup":
                setup = _setup(arguments[0])
                cache = ExpertCache(setup.slots, setup.make_policy(), setup.shared_layers(), setup.fill, setup.records)
                continue
            if cache is None:
                raise ValueError("it does not begin with a setup")
            if name == "counters":
                if asdict(cache.counters) != arguments[0]:
                    raise ValueError(f"the counters are {asdict(cache.counters)}, but were {arguments[0]}")
                return cache.counters
            told, answered = _CALLS[name](cache, arguments)
        except (ValueError, KeyError, IndexError, TypeError, RuntimeError, PolicyError) as error:
            raise CacheLogError(f"entry {number} of the cache log ({name}): {error}") from error
        if told != answered:
            raise CacheLogError(f"entry {number} of the cache log ({name}): answered {answered}, but was {told}")
    raise CacheLogError("the cache log has no end: the run that wrote it was cut off")


def _setup(values: dict[str, Any]) -> CacheSetup:
    return CacheSetup(**values | {"layers": tuple(values["layers"])})


def _keys(values: Iterable[Sequence[int]]) -> list[ExpertKey]:
    return [ExpertKey(*value) for value in values]


def _plain(found: Iterable[Reservation]) -> list[Any]:
    return [[list(load.key), load.slot, None if load.victim is None else list(load.victim)] for load in found]


def _lookup(cache: ExpertCache, a: Sequence[Any]) -> tuple[Any, Any]:
    return a[4], [len(part) for part in cache.lookup(a[0], a[1], decode=a[2], recent=a[3])]


def _reserve(cache: ExpertCache, a: Sequence[Any]) -> tuple[Any, Any]:
    return _plain(_reservations(a[2])), _plain(cache.reserve(_keys(a[0]), a[1]))


def _reserve_ahead(cache: ExpertCache, a: Sequence[Any]) -> tuple[Any, Any]:
    answers = None if a[2] is None else iter(a[2])
    repays = None if answers is None else lambda key, victim: next(answers)
    return _plain(_reservations(a[1])), _plain(cache.reserve_ahead(_keys(a[0]), repays))


def _reserve_next(cache: ExpertCache, a: Sequence[Any]) -> tuple[Any, Any]:
    return _plain(_reservations(a[1])), _plain(cache.reserve_next(_keys(a[0])))


def _change(cache: ExpertCache, a: Sequence[Any]) -> tuple[Any, Any]:
    setup = _setup(a[0])
    cache.change_policy(setup.make_policy(), setup.shared_layers())
    return None, None


def _reservations(values: Iterable[Sequence[Any]]) -> list[Reservation]:
    return [
        Reservation(ExpertKey(*key), slot, None if victim is None else ExpertKey(*victim))
        for key, slot, victim in values
    ]


_CALLS: dict[str, Any] = {
    "lookup": _lookup,
    "reserve": _reserve,
    "reserve_ahead": _reserve_ahead,
    "reserve_next": _reserve_next,
    "commit": lambda cache, a: (None, cache.commit(ExpertKey(*a[0]))),
    "abandon": lambda cache, a: (None, cache.abandon(ExpertKey(*a[0]))),
    "release": lambda cache, a: (None, cache.release(ExpertKey(*a[0]))),
    "end_event": lambda cache, a: (None, cache.end_event()),
    "clear": lambda cache, a: (None, cache.clear()),
    "retire": lambda cache, a: (a[2], cache.retire(a[0], a[1])),
    "grow": lambda cache, a: (None, cache.grow(a[0])),
    "change": _change,
}


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m cache.cache_log FILE", file=sys.stderr)
        return 2
    try:
        counters = replay_log(load_log(Path(arguments[0])))
    except CacheLogError as error:
        print(f"cache log: {error}", file=sys.stderr)
        return 1
    print(f"the same: {counters}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
