"""Changes how much memory the tiers have, between two tokens, without a restart."""

from __future__ import annotations

from dataclasses import replace

from offload.errors import BudgetError, DeviceError, UsageError
from offload.events import LiveChanges
from offload.memory.plan import Plan, make_plan
from offload.memory.process import available_memory, process_memory
from offload.memory.storage import AnyPlan, Storage
from offload.memory.tier_plan import Asked, TierPlan, make_tier_plan
from offload.memory.tiers import TieredLoads
from offload.model.experts import ExpertRuntime


class Rooms:
    """The tiers of one engine and the plan that they follow at the moment. For the engine thread, between events."""

    def __init__(self, runtime: ExpertRuntime, storage: Storage, plan: AnyPlan) -> None:
        self.plan: AnyPlan = replace(plan, slots=runtime.cache.slots)
        self._runtime = runtime
        self._storage = storage

    def planned(self, changes: LiveChanges) -> AnyPlan:
        """The plan under other budgets. Changes nothing; raises UsageError if they make no sense or are too small."""
        if (changes.residency, changes.ram, changes.vram) == (None, None, None):
            return self.plan
        if changes.residency is not None and not 0 < changes.residency <= 1:
            raise UsageError("the residency must be above 0 and at most 1 (0.5 is half)")
        try:
            return planned_again(self.plan, changes.residency, changes.ram, changes.vram)
        except BudgetError as error:
            raise UsageError(str(error)) from error

    def follow(self, plan: AnyPlan) -> AnyPlan:
        """Make the tiers as large as ``plan`` says; returns what came of it."""
        if plan != self.plan:
            self.plan = resize(self._runtime, self._storage, plan)
        return self.plan

    def make_room(self, error: Exception) -> str:
        """The device's memory is used up: give up an eighth of the slots; returns what to tell the user.

        Raises DeviceError if there is nothing to give up.
        """
        self._storage.device.recover()
        self._runtime.settle()
        before = self._runtime.cache.slots
        set_slots(self._runtime, self._storage, before - max(1, before // 8))
        left = self._runtime.cache.slots
        if left == before:
            raise DeviceError(
                f"the device has no memory left, and no expert slots to give up ({error}); try a smaller --ctx or "
                "--prefill-chunk"
            ) from error
        self.plan = replace(self.plan, slots=left)
        return f"the device ran out of memory: {before - left} expert slots were given up, {left} are left"


def planned_again(
    plan: AnyPlan, residency: float | None = None, ram: int | None = None, vram: int | None = None
) -> AnyPlan:
    """``plan`` with other budgets; None keeps one, and lets one that was ``auto`` follow the residency.

    A residency stays what was asked for, also under another budget. Raises BudgetError, naming the smallest budget that
    works.
    """
    asked = plan.residency_asked if residency is None else residency
    if ram is None and plan.budget_chosen:
        ram = plan.budget
    now = process_memory().total
    available = available_memory() + max(0, now - plan.baseline.anonymous - plan.baseline.files)
    if isinstance(plan, Plan):
        if vram is not None:
            raise BudgetError(f"{plan.device} has no memory of its own; change the RAM")
        return make_plan(plan.model, plan.device, plan.sizes, plan.baseline, available, ram, asked)
    if vram is None and plan.vram_chosen:
        vram = plan.vram_budget
    wish = Asked(vram, ram, asked, plan.exclusive)
    return make_tier_plan(plan.model, plan.device, plan.sizes, plan.baseline, available, plan.vram, plan.staging, wish)


def resize(runtime: ExpertRuntime, storage: Storage, plan: AnyPlan) -> AnyPlan:
    """Make the tiers as large as ``plan`` says, between two events; what is resident stays as far as it fits.

    Returns the plan with the slots that there really are: whole segments, and what the device gives.
    """
    runtime.settle()
    if isinstance(plan, TierPlan):
        storage.device.set_budget(plan.vram_budget - plan.vram.reserved)
    set_slots(runtime, storage, plan.slots)
    new: AnyPlan = replace(plan, slots=runtime.cache.slots)
    if isinstance(new, TierPlan):
        assert isinstance(storage.loads, TieredLoads)
        new = replace(new, host_slots=storage.loads.resize_host(new.host_slots))
    return new


def set_slots(runtime: ExpertRuntime, storage: Storage, slots: int) -> None:
    """Have ``slots`` slots on the device, rounded to whole segments. Loads must have been settled."""
    cache, arena = runtime.cache, storage.arena
    segment = arena.segment_slots
    if slots < cache.slots:
        gone = cache.retire(-(-(cache.slots - slots) // segment) * segment, segment)
        storage.loads.quiesce(gone)
        arena.release(gone)
    elif slots - cache.slots >= segment:
        there = set(arena.available)
        missing = [slot for slot in range(arena.slots) if slot not in there]
        groups = [slot // segment for slot in missing]
        wanted = sorted(set(groups))[: (slots - cache.slots) // segment]
        cache.grow(arena.restore([slot for slot, group in zip(missing, groups, strict=True) if group in wanted]))
