"""The memory plan of a device with memory of its own: VRAM, RAM and disk. A pure function; standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from offload.config import format_size
from offload.errors import BudgetError
from offload.memory.plan import MARGIN_BYTES, Baseline, ModelSizes, left_to_others

VRAM_MARGIN_BYTES = 128 * 2**20
"""What a caching allocator holds beyond the sums below: it rounds, and keeps blocks of other sizes."""


@dataclass(frozen=True, slots=True)
class Vram:
    """The device's own memory in bytes: all of it, what is free, and what context and libraries take at once."""

    total: int
    free: int
    reserved: int


@dataclass(frozen=True, slots=True)
class TierPlan:
    """What goes where. All sizes in bytes. ``budget`` is that of the process's RAM, ``vram_budget`` of its VRAM.

    ``left`` is what a budget of RAM that was not chosen leaves of what is free.
    """

    model: str
    device: str
    sizes: ModelSizes
    baseline: Baseline
    vram: Vram
    vram_budget: int
    vram_chosen: bool
    budget: int
    budget_chosen: bool
    slots: int
    host_slots: int
    staging: int
    exclusive: bool
    residency_asked: float | None = None
    left: int | None = field(default=None, compare=False)

    @property
    def residency(self) -> float:
        """Share of the experts that have a slot on the device."""
        return self.slots / self.sizes.num_experts

    @property
    def host_residency(self) -> float:
        return self.host_slots / self.sizes.num_experts

    @property
    def in_memory(self) -> float:
        """Share of the experts that need no disk, once they were read."""
        held = self.slots + self.host_slots if self.exclusive else max(self.slots, self.host_slots)
        return min(1.0, held / self.sizes.num_experts)

    @property
    def anonymous_bytes(self) -> int:
        """RAM that belongs to the process alone: everything but mapped files and the margin."""
        sizes = self.sizes
        return self.baseline.anonymous + sizes.host_compute_bytes + (self.host_slots + self.staging) * sizes.slot_bytes

    def vram_rows(self) -> list[tuple[str, int, str]]:
        """(what, bytes, remark) of the device's memory, adding up to its budget."""
        sizes = self.sizes
        slots = self.slots * sizes.slot_bytes
        return [
            ("context", self.vram.reserved, "the device's own, and its libraries'"),
            ("skeleton", sizes.skeleton_bytes, "attention, routers, norms, shared experts, embeddings"),
            ("KV cache", sizes.kv_bytes, sizes.kv_remark),
            ("activations", sizes.activation_bytes, sizes.activation_remark),
            *([("graphs", sizes.graph_bytes, "of decode passes (--graphs)")] if sizes.graph_bytes else []),
            ("margin", VRAM_MARGIN_BYTES, "the allocator"),
            ("expert slots", slots, self._held(self.slots, self.residency)),
            ("unused", self.vram_budget - vram_fixed(sizes, self.vram) - slots, ""),
        ]

    def ram_rows(self) -> list[tuple[str, int, str]]:
        """The same of the process's RAM."""
        sizes = self.sizes
        host = self.host_slots * sizes.slot_bytes
        return [
            ("libraries", self.baseline.files, "mapped files of Python, torch and transformers"),
            ("process", self.baseline.anonymous, "their own memory"),
            ("computing", sizes.host_compute_bytes, "misses that the CPU computes (--miss)"),
            ("staging", self.staging * sizes.slot_bytes, f"{self.staging} buffers between disk and device"),
            ("margin", MARGIN_BYTES, "allocator and threads"),
            ("host tier", host, self._held(self.host_slots, self.host_residency)),
            ("unused", self.budget - ram_fixed(sizes, self.baseline, self.staging) - host, ""),
        ]

    def rows(self) -> list[tuple[str, int, str]]:
        rows = [(f"VRAM: {what}", size, remark) for what, size, remark in self.vram_rows()]
        rows += [(f"RAM: {what}", size, remark) for what, size, remark in self.ram_rows()]
        experts = self.sizes.num_experts
        return [*rows, ("disk: experts", experts * self.sizes.slot_bytes, f"{experts} experts, all of them")]

    def summary(self) -> list[str]:
        vram = "--vram" if self.vram_chosen else "--vram auto"
        ram = "--ram" if self.budget_chosen else "--ram auto"
        lines = [
            f"{self.model} on {self.device}: {format_size(self.vram_budget)} of VRAM ({vram}) and "
            f"{format_size(self.budget)} of RAM ({ram})",
            f"{self.slots} expert slots hold {self.residency:.0%} of the experts, {self.host_slots} buffers in RAM "
            f"{self.host_residency:.0%}" + (" (none of them twice)" if self.exclusive else ""),
        ]
        if not self.vram_chosen and self.vram_budget < self.vram.total:
            left = format_size(self.vram.total - self.vram_budget)
            lines[0] += f"; {left} of VRAM are left to the desktop and others"
        lines[0] += left_to_others(self.left, "RAM")
        if self.in_memory == 1:
            lines[1] += "; nothing is read from disk while answering"
        if self.sizes.chunk is not None:
            lines.append(self.sizes.chunk.summary())
        return lines

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "device": self.device,
            "ram_budget_bytes": self.budget,
            "ram_left_bytes": self.left,
            "vram_budget_bytes": self.vram_budget,
            "vram_left_bytes": None if self.vram_chosen else self.vram.total - self.vram_budget,
            "anonymous_bytes": self.anonymous_bytes,
            "context_tokens": self.sizes.context_tokens,
            "chunk_tokens": self.sizes.chunk_tokens,
            "experts": self.sizes.num_experts,
            "slot_bytes": self.sizes.slot_bytes,
            "expert_slots": self.slots,
            "residency": self.residency,
            "host_slots": self.host_slots,
            "host_residency": self.host_residency,
            "tiers": "exclusive" if self.exclusive else "inclusive",
            "vram_bytes": {name.lower().replace(" ", "_"): size for name, size, _ in self.vram_rows()},
            "bytes": {name.replace(" ", "_"): size for name, size, _ in self.ram_rows()},
            "disk_bytes": self.sizes.num_experts * self.sizes.slot_bytes,
        }

    def _held(self, slots: int, share: float) -> str:
        return f"{slots} of {self.sizes.num_experts} experts ({share:.0%}), {format_size(self.sizes.slot_bytes)} each"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user asked for; None means ``auto``."""

    vram: int | None = None
    ram: int | None = None
    residency: float | None = None
    exclusive: bool = False


def make_tier_plan(
    model: str,
    device: str,
    sizes: ModelSizes,
    baseline: Baseline,
    available: int,
    vram: Vram,
    staging: int,
    asked: Asked,
) -> TierPlan:
    """Divide VRAM and RAM: what must be there first, the rest becomes slots and the host tier.

    ``available`` is the RAM that the process may have beside what it has. Without ``--vram`` 90 % of the free VRAM is
    taken, without ``--ram`` 90 % of the RAM, but no more than the model can use. Raises BudgetError, naming the
    smallest budget that works.
    """
    fixed = vram_fixed(sizes, vram)
    most = sizes.num_experts if asked.residency is None else max(1, round(sizes.num_experts * asked.residency))
    if asked.vram is not None and asked.vram > vram.total:
        raise BudgetError(f"--vram {format_size(asked.vram)}: {device} has {format_size(vram.total)}")
    vram_budget = asked.vram if asked.vram is not None else min(vram.free * 9 // 10, fixed + most * sizes.slot_bytes)
    _check(model, sizes, vram_budget, fixed + sizes.slot_bytes, "--vram", asked.vram is not None)
    slots = min(most, (vram_budget - fixed) // sizes.slot_bytes)
    fixed = ram_fixed(sizes, baseline, staging)
    ceiling = (available + baseline.anonymous + baseline.files) * 9 // 10
    wanted = sizes.num_experts - (slots if asked.exclusive else 0)
    budget = asked.ram if asked.ram is not None else min(ceiling, fixed + wanted * sizes.slot_bytes)
    _check(model, sizes, budget, fixed, "--ram", asked.ram is not None)
    host_slots = min(wanted, (budget - fixed) // sizes.slot_bytes)
    return TierPlan(
        model,
        device,
        sizes,
        baseline,
        vram,
        vram_budget,
        asked.vram is not None,
        budget,
        asked.ram is not None,
        slots,
        host_slots,
        staging,
        asked.exclusive,
        asked.residency,
        None if asked.ram is not None else available + baseline.anonymous + baseline.files - budget,
    )


def vram_fixed(sizes: ModelSizes, vram: Vram) -> int:
    """VRAM of everything but the slots."""
    passes = sizes.activation_bytes + sizes.graph_bytes
    return vram.reserved + sizes.skeleton_bytes + sizes.kv_bytes + passes + VRAM_MARGIN_BYTES


def ram_fixed(sizes: ModelSizes, baseline: Baseline, staging: int) -> int:
    """RAM of everything but the host tier."""
    computing = sizes.host_compute_bytes
    return baseline.files + baseline.anonymous + computing + staging * sizes.slot_bytes + MARGIN_BYTES


def _check(model: str, sizes: ModelSizes, budget: int, smallest: int, flag: str, chosen: bool) -> None:
    if budget >= smallest:
        return
    needed = f"{-(-smallest // 2**20)}MiB"
    if chosen:
        raise BudgetError(
            f"{flag} {format_size(budget)} is too small for {model} at {sizes.context_tokens} tokens of context: the "
            f"smallest that works is {flag} {needed}"
            + (" (a smaller --ctx, --prefill-chunk or --dense-format needs less)" if flag == "--vram" else "")
        )
    raise BudgetError(
        f"{model} needs at least {needed} of {flag.removeprefix('--').upper()} at {sizes.context_tokens} tokens of "
        f"context, but only {format_size(max(0, budget))} may be used; close other programs"
        + (", or try a smaller --ctx, --prefill-chunk or --dense-format int4" if flag == "--vram" else "")
    )
