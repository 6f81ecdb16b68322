"""Exponentially weighted frequency (LRFU)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from cache.keys import ExpertKey
from cache.policies.base import PolicyError
from cache.policies.scored import ScoredPolicy


class EWMA(ScoredPolicy):
    """Gives up the record with the lowest decayed count of events.

    Every use adds 1 to a score that halves every ``half_life`` events of its layer: a short half-life behaves like
    LRU, a long one like LFU. Scores are kept as logarithms, as of time 0: for a clock ``t`` a use adds
    ``2**(t / half_life)``, so scores of different ages compare without touching the ones that were not used.

    Source: Lee et al., "LRFU: a spectrum of policies that subsumes the least recently used and least frequently
    used policies", IEEE Transactions on Computers 50(12), 2001.
    """

    name = "ewma"
    growing = True

    def __init__(self, *, half_life: float = 16.0) -> None:
        super().__init__()
        if not (half_life > 0 and math.isfinite(half_life)):
            raise PolicyError(f"ewma: half_life must be above 0, not {half_life}")
        self._half_life = half_life
        self._clock: defaultdict[int, int] = defaultdict(int)  # events seen, by layer
        self._log2_score: dict[ExpertKey, float] = {}

    def score(self, key: ExpertKey) -> float:
        return self._log2_score.get(key, -math.inf)

    def uses(self, key: ExpertKey) -> float:
        """The decayed count itself, as of the last event of the key's layer."""
        score = self._log2_score.get(key)
        return 0.0 if score is None else 2.0 ** (score - self._clock[key.layer] / self._half_life)

    def score_now(self, key: ExpertKey) -> float | None:
        return self.uses(key)

    def update_scores(self, keys: Sequence[ExpertKey]) -> None:
        for layer in {key[0] for key in keys}:
            self._clock[layer] += 1
        scores, log2 = self._log2_score, math.log2
        for key in keys:
            now = self._clock[key[0]] / self._half_life
            before = scores.get(key)
            # log2(2**before + 2**now), without leaving the logarithm: 2**now overflows in a long session
            if before is None:
                scores[key] = now
            elif before > now:
                scores[key] = before + log2(1.0 + 2.0 ** (now - before))
            else:
                scores[key] = now + log2(1.0 + 2.0 ** (before - now))
