"""A fixed order by uses in earlier runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cache.counts import CountsError, count_uses, load_counts
from cache.keys import ExpertKey
from cache.policies.base import PolicyContext, PolicyError
from cache.policies.scored import ScoredPolicy


class Static(ScoredPolicy):
    """Gives up the record with the fewest uses in ``FILE``, the least recent of equals first. Learns nothing.

    ``static:FILE`` takes a trace or a file of counts (:mod:`cache.counts`); in a replay ``static`` takes the requests
    that are there to learn from.
    """

    name = "static"
    growing = True
    takes = "file"
    learns = True

    def __init__(self, uses: Mapping[ExpertKey, float]) -> None:
        super().__init__()
        self._uses = uses

    @classmethod
    def create(cls, context: PolicyContext, **values: Any) -> Static:
        file = values.get("file", "").strip()
        if file:
            try:
                return cls(load_counts(Path(file).expanduser()))
            except CountsError as error:
                raise PolicyError(f"policy static: {error}") from error
        if context.training is None:
            raise PolicyError("policy static needs the uses to go by: static:FILE, a trace or a file of counts")
        return cls(count_uses(context.training))

    def score(self, key: ExpertKey) -> float:
        return self._uses.get(key, 0.0)

    def update_scores(self, keys: Sequence[ExpertKey]) -> None:
        pass
