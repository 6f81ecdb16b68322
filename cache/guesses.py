"""Which of a predictor's guesses are worth a copy: learned from what became of guesses like them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

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
