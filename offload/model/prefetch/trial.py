"""Which of several ways to prefetch decodes fastest, if any: found out while decoding. Standard library only.

Windows of decoded tokens run in turn without prefetching and with a candidate. Two neighbours are a pair: what the
conversation is about and what else the machine does are much the same in both. The order within a pair alternates, so
that a drift counts for neither. A candidate is used if its pairs say that it is faster by 2.5 times the standard error;
else nothing is prefetched. Once one has won, the next ones must be faster than it, and its tokens are gained meanwhile.
What a test may lose by a bad candidate is bounded, and after a test there is a rest of several times its length before
the next: what pays may change with what is talked about.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Generator, Sequence

from offload.events import PrefetchGain, PrefetchTrial

BASE = "off"
WARM_UP = 8
"""Tokens before the first test: the expert cache fills."""
WINDOW = 8
"""Tokens in a row with the same prefetch. The first after a change is not counted."""
FEWEST_PAIRS, MOST_PAIRS = 6, 32
ERRORS = 2.5
"""How many standard errors the gain must be away from nothing: more than for one look, since every pair is one."""
LEAST_GAIN = 0.01
"""A test ends when a candidate cannot be faster by this share."""
LOSS_TOKENS, LOSS_SHARE = 2.0, 0.01
"""What tests may lose: the time of so many tokens, and this share of all time so far. Beyond it, they wait."""
REST_FACTOR, SHORTEST_REST, LONGEST_REST = 8, 256, 4096
"""Tokens between two rounds of tests: so many times what a round took, within these bounds."""

Steps = Generator[str, float, None]
"""Yields the prefetch of the next token and gets the seconds that it took."""


class Trial:
    """``arm`` is the prefetch of the next token, ``choice`` what the latest round of tests settled on.

    ``resting``: no test is under way. ``report`` is replaced as a whole, so that other threads may read it.
    """

    def __init__(self, candidates: Sequence[str]) -> None:
        self.candidates = tuple(candidates)
        self.choice = BASE
        self.resting = False
        self.report = PrefetchTrial(BASE, None, 0, ())
        self._rounds = self._tokens = 0
        self._seconds = self._lost = 0.0
        self._last_base = 0.0  # seconds of a token without prefetching
        self._gains: dict[str, PrefetchGain] = {}
        self.restart()

    def record(self, seconds: float) -> None:
        """The token that ran with :attr:`arm` took so long."""
        self._tokens += 1
        self._seconds += seconds
        self.arm = self._steps.send(seconds)

    def restart(self) -> None:
        """What was found out does not hold any more: test again, beginning with nothing."""
        self.choice = BASE
        self._gains = {}
        self._steps = self._run()
        self.arm = next(self._steps)

    def _run(self) -> Steps:
        self._tell(None)
        yield from self._spend(BASE, WARM_UP)
        while True:
            began = self._tokens
            won: dict[str, float] = {}
            for candidate in self.candidates:
                self._tell(candidate)
                best = max(won, key=won.__getitem__, default=BASE)
                gain = yield from self._test(candidate, best, won.get(best, 0.0))
                if gain is not None:
                    won[candidate] = gain
                    self.choice = max(won, key=won.__getitem__)
            self._rounds += 1
            self.choice = max(won, key=won.__getitem__, default=BASE)
            self._tell(None, resting=True)
            rest = min(LONGEST_REST, max(SHORTEST_REST, REST_FACTOR * (self._tokens - began)))
            yield from self._spend(self.choice, rest)

    def _test(self, candidate: str, rival: str, ahead: float) -> Generator[str, float, float | None]:
        """Returns the gain of ``candidate`` over no prefetch in logarithms, or None if it is not to be used.

        It is compared with ``rival``, which is faster than no prefetch by ``ahead``.
        """
        pairs: list[tuple[float, float]] = []  # seconds of a token: base, candidate
        losses: list[float] = []
        while len(pairs) < MOST_PAIRS:
            expected = max(0.0, statistics.fmean(losses)) if losses else 0.0
            while self._lost + expected > LOSS_TOKENS * self._last_base + LOSS_SHARE * self._seconds:
                yield from self._spend(rival, WINDOW)
            if len(pairs) % 2:
                with_it = yield from self._window(candidate)
                base = yield from self._window(rival)
            else:
                base = yield from self._window(rival)
                with_it = yield from self._window(candidate)
            pairs.append((base, with_it))
            self._last_base = base
            losses.append(WINDOW * (with_it - base))
            self._lost = max(0.0, self._lost + losses[-1])
            gain, error = self._judge(candidate, pairs, ahead)
            if len(pairs) >= FEWEST_PAIRS:
                if gain - ERRORS * error > 0:
                    return gain + ahead
                if gain + ERRORS * error < LEAST_GAIN:
                    return None
        return gain + ahead if candidate == self.choice and gain > 0 else None  # no telling: it stays as it was

    def _window(self, arm: str) -> Generator[str, float, float]:
        """Returns the mean seconds of a token."""
        skipped = int(self.arm != arm)
        seconds = []
        for _ in range(WINDOW):
            seconds.append((yield arm))
        return statistics.fmean(seconds[skipped:])

    def _spend(self, arm: str, tokens: int) -> Steps:
        for _ in range(tokens):
            yield arm

    def _judge(self, candidate: str, pairs: Sequence[tuple[float, float]], ahead: float) -> tuple[float, float]:
        """The mean of the pairs' gains in logarithms and its standard error. The report has them as shares, and over no
        prefetch, which the rival of the pairs is faster than by ``ahead``."""
        gains = [math.log(base / with_it) if base > 0 and with_it > 0 else 0.0 for base, with_it in pairs]
        gain = statistics.fmean(gains)
        error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
        bases, candidates = (statistics.fmean(column) for column in zip(*pairs, strict=True))
        self._gains[candidate] = PrefetchGain(
            prefetch=candidate,
            pairs=len(pairs),
            gain=math.expm1(gain + ahead),
            error=None if math.isinf(error) else error,
            off_tokens_per_s=math.exp(-ahead) / bases if bases else None,
            tokens_per_s=1 / candidates if candidates else None,
        )
        self._tell(candidate)
        return gain, error

    def _tell(self, testing: str | None, resting: bool = False) -> None:
        self.resting = resting
        self.report = PrefetchTrial(self.choice, testing, self._rounds, tuple(self._gains.values()))
