"""Which of a predictor's guesses are worth a copy: learned from what became of guesses like them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

LEAST = 0.45
"""Share of right guesses below which a copy does not pay. The one that is under way when the router speaks cannot be
stopped: half of it is over then, on average, so a right one saves as much as a wrong one costs. 0.4 and 0.5 do as well
(docs/devices.md, Prefetching over the link)."""
HALF_LIFE = 256.0
"""Guesses of a place after which one counts half."""


def guesses_of(top_k: int, link: bool) -> int:
    """How many experts are foretold for a layer whose tokens take ``top_k``.

    All of them where copies go over a link beside compute. Half where a read takes the disk and the CPU from reads that
    are waited for: three in four of the better half are used, but only one in two of the others (docs/performance.md).
    """
    return top_k if link else max(1, top_k // 2)


class GuessWorth:
    """Counts, for each place in a list of guesses, how often the guess came true where it was not resident.

    A place is the rank in the list and how many layers the list looks ahead. A predictor's guesses are mostly resident:
    what is often used is both likely and in a slot. So its recall tells little of the guesses that a copy is about, and
    those are counted apart, whether they were copied or not.
    """

    def __init__(self, least: float = LEAST) -> None:
        self._least = least
        self._keep = 2.0 ** (-1 / HALF_LIFE)
        self._counts: dict[tuple[int, int], tuple[float, float]] = {}  # place -> right and all, both decaying
        self._open: dict[int, list[tuple[int, tuple[int, int]]]] = {}  # layer -> guesses and their places

    def choose(self, layer: int, steps: int, guesses: Sequence[int], absent: Collection[int]) -> list[int]:
        """Those of ``guesses`` for ``layer``, likeliest first, that are resident or worth a copy.

        ``steps``: the events until that layer's; ``absent``: those of them that are neither resident nor on their way.
        """
        places = [(guess, (steps, rank)) for rank, guess in enumerate(guesses)]
        self._open.setdefault(layer, []).extend(pair for pair in places if pair[0] in absent)
        return [guess for guess, place in places if guess not in absent or self._share(place) >= self._least]

    def record_event(self, layer: int, experts: Collection[int], *, decode: bool) -> None:
        """What ``layer`` took: the guesses for it are judged. Those for an event that is no token's are forgotten."""
        for guess, place in self._open.pop(layer, ()):
            if decode:
                right, seen = self._counts.get(place, (1.0, 1.0))
                self._counts[place] = right * self._keep + (guess in experts), seen * self._keep + 1

    def _share(self, place: tuple[int, int]) -> float:
        right, seen = self._counts.get(place, (1.0, 1.0))  # nothing is known: try
        return right / seen


MOST_WRONG = 0.03
"""Records that rows may read for nothing, for each that they have to read."""
LEAST_SURE = 0.5
"""A guess that is less likely than this is never read ahead: it would cost more than it saves."""
EVENT_HALF_LIFE = 128.0
"""Events after which what was seen of rows counts half."""
_LEVELS = 12
"""The surest guesses are those of which the ranks tell that one in 2**12 is wrong."""


class _Foretold(NamedTuple):
    """What was guessed for a layer: those of each row's guesses that were absent, by rank; of each of these experts the
    level of doubt; what was read of them, and how many records the event before had to read."""

    rows: list[list[tuple[int, int]]]
    levels: dict[int, int]
    chosen: list[int]
    loads: int


class SureGuesses:
    """Chooses of what several rows are likely to take of the next layer the few records that are almost sure.

    Each row's guesses come ranked. How often one of a rank came true for its row is counted, over those that had no
    slot. If rows erred independently, an expert would be left out as often as the product of their doubts tells. Rows
    about the same thing err together, so that product is no more than a level, a power of 2, and how often a guess of a
    level was wrong is counted in turn. The surest are chosen first, until as many are expected to be wrong as
    :data:`MOST_WRONG` allows; and none where more than that were of late. All follows from events alone, never from
    the time that anything takes.
    """

    def __init__(self) -> None:
        self._keep = 2.0 ** (-1 / EVENT_HALF_LIFE)
        # all of these decay; nothing is sure before it was seen, and a level is first taken for what it says
        self._right: defaultdict[int, float] = defaultdict(float)  # by rank
        self._seen: defaultdict[int, float] = defaultdict(lambda: 4.0)
        self._wrong_at = [4.0 / 2**level for level in range(_LEVELS + 1)]
        self._seen_at = [4.0] * (_LEVELS + 1)
        self._wrong = self._loads = 0.0
        self._open: dict[int, _Foretold] = {}  # by layer

    def choose(self, layer: int, rows: Sequence[Sequence[int]], absent: Collection[int], loads: int) -> list[int]:
        """Those of ``absent`` to read ahead for ``layer``, the surest first.

        ``rows`` are the guesses for each row, the likeliest first; ``absent`` are experts that are not resident;
        ``loads``: how many records a layer has to read, as far as is known.
        """
        doubt: dict[int, float] = {}  # how likely no row takes it, if they are independent
        pairs = [[(rank, expert) for rank, expert in enumerate(row) if expert in absent] for row in rows]
        for row in pairs:
            for rank, expert in row:
                doubt[expert] = doubt.get(expert, 1.0) * (1 - self._right[rank] / self._seen[rank])
        levels = {expert: _level(each) for expert, each in doubt.items()}
        chosen: list[int] = []
        allowed = MOST_WRONG * loads if self._wrong <= MOST_WRONG * self._loads + 1 else 0.0
        for expert in sorted(doubt, key=lambda expert: (doubt[expert], expert)):
            level = levels[expert]
            likely_wrong = max(doubt[expert], self._wrong_at[level] / self._seen_at[level])
            allowed -= likely_wrong
            if likely_wrong > 1 - LEAST_SURE or allowed < 0:
                break
            chosen.append(expert)
        self._open[layer] = _Foretold(pairs, levels, chosen, loads)
        return chosen

    def record_event(self, layer: int, rows: Sequence[Collection[int]] | None) -> None:
        """What each row took of ``layer``, in the order of :meth:`choose`; None: the event is not one of such rows."""
        found = self._open.pop(layer, None)
        if found is None or rows is None or len(rows) != len(found.rows):
            return
        for counts in (self._right, self._seen):
            for rank in counts:
                counts[rank] *= self._keep
        for row, taken in zip(found.rows, rows, strict=True):
            for rank, expert in row:
                self._right[rank] += expert in taken
                self._seen[rank] += 1
        everything = set().union(*rows)
        self._wrong_at = [count * self._keep for count in self._wrong_at]
        self._seen_at = [count * self._keep for count in self._seen_at]
        for expert, level in found.levels.items():
            self._wrong_at[level] += expert not in everything
            self._seen_at[level] += 1
        self._wrong = self._wrong * self._keep + sum(expert not in everything for expert in found.chosen)
        self._loads = self._loads * self._keep + found.loads


def _level(doubt: float) -> int:
    return min(_LEVELS, int(-math.log2(doubt))) if doubt > 0 else _LEVELS
