"""The hit rate to expect of a model that nobody has recorded, by residency. Standard library only."""

from __future__ import annotations

import itertools

_HIT_RATES = ((0.0, 0.0), (0.0625, 0.257), (0.125, 0.431), (0.25, 0.678), (0.5, 0.925), (0.75, 0.99), (1.0, 1.0))
"""Hit rate by residency: a published trace of gpt-oss-20b (24 layers, 32 experts, top 4), 9,544 decoded tokens, with
``ewma`` and the scope ``global``, replayed with ``cache.simulate`` (2026-11-25). Models with more and smaller experts
may do better: a short trace with 128 experts a layer hits 59 % at a residency of an eighth, 79 % at a quarter."""


def expected_hit_rate(residency: float) -> float:
    """Between the points of a real trace, on straight lines."""
    for (low, least), (high, most) in itertools.pairwise(_HIT_RATES):
        if residency <= high:
            return least + (most - least) * (residency - low) / (high - low)
    return 1.0
