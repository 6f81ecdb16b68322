"""The tiers of one engine: slots, host buffers and what loads records into them, made as a plan says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from cache.host_tier import HostTier
from cache.keys import ExpertKey
from cache.policies import Policy, PolicyContext, PolicyError, make_policy
from offload.checkpoint.expert_file import ExpertFile
from offload.config import EngineSettings
from offload.devices.base import Device, HostArena, SlotArena
from offload.errors import UsageError
from offload.events import LoadProgress, Notice
from offload.memory.lanes import DiskLane
from offload.memory.loads import DirectLoads, Loads
from offload.memory.plan import Plan
from offload.memory.tier_plan import TierPlan
from offload.memory.tiers import TieredLoads

AnyPlan = Plan | TierPlan
OnEvent = Callable[[LoadProgress | Notice], None]


@dataclass(slots=True)
class Storage:
    """``host`` is None where slots are host memory."""

    device: Device
    arena: SlotArena
    loads: Loads
    host: HostArena | None = None

    def close(self) -> None:
        """Stop the lanes and give all memory back."""
        self.loads.close()
        self.arena.close()
        if self.host is not None:
            self.host.close()
        self.device.close()


def staging_buffers(read_workers: int) -> int:
    """Host buffers for records that pass through: one for each reader, and one whose copy is under way."""
    return read_workers + 1


def make_host_policy(spec: str, layers: int = 0, experts: int = 0) -> Policy:
    """What decides which records stay in host memory; ``experts`` is the most that a layer has.

    Raises UsageError for what is no such policy.
    """
    try:
        return make_policy(spec, PolicyContext(layers=layers, experts=experts))
    except PolicyError as error:
        raise UsageError(f"--host-policy: {error}") from error


def open_storage(
    device: Device, plan: AnyPlan, file: ExpertFile, settings: EngineSettings, on_event: OnEvent
) -> Storage:
    """Allocate what ``plan`` says and start nothing yet. The device is closed with the storage.

    A device that refuses some of the slots gets fewer, and a notice says so. Raises BudgetError.
    """
    sizes = plan.sizes

    def touched(done: int, total: int) -> None:
        on_event(LoadProgress("slots", done, total, "bytes"))

    with contextlib.ExitStack() as undo:
        arena = device.allocate_slots(plan.slots, sizes.slot_bytes, sizes.num_experts)
        undo.callback(arena.close)
        arena.touch(touched)
        lost = plan.slots - len(arena.available)
        if lost >= arena.segment_slots:
            on_event(
                Notice(f"the device refuses memory for {lost} of {plan.slots} expert slots; going on with the rest")
            )
        if isinstance(plan, Plan):
            undo.pop_all()
            return Storage(device, arena, DirectLoads(DiskLane(file, settings.read_workers), arena))
        host = device.allocate_host(plan.host_slots, sizes.slot_bytes, sizes.num_experts + plan.staging)
        undo.callback(host.close)
        if not host.pinned:
            on_event(Notice("the system does not let this process pin memory: copies to the device are slower"))
        layers = file.manifest.layers
        tier = HostTier(
            plan.host_slots, make_host_policy(settings.host_policy, len(layers), max(layer.experts for layer in layers))
        )
        loads = TieredLoads(device, file, arena, host, tier, settings.read_workers, plan.staging, plan.exclusive)
        undo.callback(loads.close)
        if plan.host_slots >= sizes.num_experts:
            _fill(loads, file, on_event)
        undo.pop_all()
    return Storage(device, arena, loads, host)


def _fill(loads: TieredLoads, file: ExpertFile, on_event: OnEvent) -> None:
    """Read all experts into host memory, so that nothing is read while answering."""
    keys = [ExpertKey(layer.layer, expert) for layer in file.manifest.layers for expert in range(layer.experts)]
    loads.fill_host(keys, lambda done: on_event(LoadProgress("experts", done, len(keys), "steps")))
