"""A plan with what to expect of it: of a named machine by its figures, of this one by those that were stored."""

from __future__ import annotations

from cache.expected import made_hit_rate
from cache.machines import Machine
from offload.compute.calibration import load as load_calibration
from offload.config import MISSES, EngineSettings
from offload.memory.estimate import Work, estimate
from offload.memory.expect import CpuRates, cpu_estimate
from offload.memory.planned import PlannedModel, WeightCounts
from offload.memory.storage import AnyPlan
from offload.memory.tier_plan import TierPlan


def planned_model(
    plan: AnyPlan, weights: WeightCounts, work: Work, experts: int, machine: Machine | None, settings: EngineSettings
) -> PlannedModel:
    """``plan`` with what to expect: of a named machine by its figures, of this one's processor by those stored.

    A layer has at most ``experts``.
    """
    if isinstance(plan, TierPlan):
        if machine is None:
            return PlannedModel(plan, weights, hint="how fast: --hardware rtx4060 plans for that card and says it")
        found = {miss: estimate(plan, work, machine, miss) for miss in MISSES}
        rates = {miss: one.tokens_per_s for miss, one in found.items()}
        return PlannedModel(plan, weights, found[settings.miss], rates)
    measured = load_calibration()
    disk = measured and measured.disk_bytes_per_s
    names = (settings.format, settings.dense_format)
    routed, dense = (measured and measured.weights_bytes_per_s(name) for name in names)
    if not disk or not routed or not dense:
        hint = "how fast: 'run-local bench --calibrate' measures this machine once, then plan says it"
        return PlannedModel(plan, weights, hint=hint)
    hit_rate = made_hit_rate(work.layers, experts, work.top_k, plan.slots, settings.policy, settings.scope)
    rates_here = CpuRates(disk, routed, dense)
    smaller = smaller_formats(settings)
    return PlannedModel(plan, weights, cpu_estimate(plan, work.layers * work.top_k, hit_rate, rates_here, smaller))


def smaller_formats(settings: EngineSettings) -> tuple[str, ...]:
    """Flags that would store the weights with fewer bits than ``settings`` do."""
    found = []
    if not settings.format.startswith("int4"):
        found.append("--format int4")
    if settings.dense_format == "native":
        found.append("--dense-format int8")
    return tuple(found)
