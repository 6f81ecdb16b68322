"""What ``run-local plan`` tells: the memory plan, what it was made of, and what to expect of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from offload.config import format_count
from offload.memory.estimate import Estimate
from offload.memory.expect import CpuEstimate
from offload.memory.plan import Plan
from offload.memory.tier_plan import TierPlan


class WeightCounts(NamedTuple):
    """How many weights a model has, tied ones counted once, and how many of them are its routed experts'."""

    total: int
    experts: int


class PlannedModel(NamedTuple):
    """A plan, what it was made of, and what to expect of it, or else ``hint``: how to get to know."""

    plan: Plan | TierPlan
    weights: WeightCounts
    expected: Estimate | CpuEstimate | None = None
    by_miss: Mapping[str, float] = {}
    """Tokens a second with each ``--miss``."""
    hint: str | None = None

    def summary(self) -> list[str]:
        share = self.weights.experts / self.weights.total
        weights = (
            f"{format_count(self.weights.total)} weights, {share:.0%} of them in {self.plan.sizes.num_experts} experts"
        )
        first, *rest = self.plan.summary()
        lines = [first, weights, *rest, *(self.expected.summary() if self.expected is not None else [])]
        if self.by_miss:
            lines.append(
                "--miss: " + ", ".join(f"{name} {rate:.1f}" for name, rate in self.by_miss.items()) + " tokens/s"
            )
        return [*lines, self.hint] if self.hint else lines

    def rows(self) -> list[tuple[str, int, str]]:
        return self.plan.rows()

    def to_json(self) -> dict[str, Any]:
        found = self.plan.to_json() | {"weights": self.weights.total, "expert_weights": self.weights.experts}
        found["expected"] = None if self.expected is None else self.expected.to_json()
        if self.by_miss:
            found["tokens_per_s_by_miss"] = dict(self.by_miss)
        return found | ({"hint": self.hint} if self.hint else {})
