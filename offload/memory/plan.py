"""The memory plan: what goes where under a budget. A pure function; standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from offload.config import DEFAULT_PREFILL_CHUNK, format_size
from offload.errors import BudgetError
from offload.memory.chunk import ChunkChoice
from offload.memory.rows import RowMemory

MARGIN_BYTES = 48 * 2**20
"""What the allocator and threads take beyond the sums below."""


_NO_MEMORY = RowMemory(0, 0)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of one model at one context, in bytes. ``activation_bytes`` is the peak inside one forward pass.

    ``kv_bytes`` is for one conversation, or for the ``rows`` of a batch that are in flight together, whatever they are:
    at least one that fills the context. ``host_compute_bytes`` is the RAM that computing experts takes beside a device
    with memory of its own, ``graph_bytes`` what graphs hold of that memory (``--graphs``). A forward pass has
    ``chunk_tokens`` at most; ``chunk`` tells why, if the plan chose them.
    """

    skeleton_bytes: int
    kv_bytes: int
    activation_bytes: int
    slot_bytes: int
    num_experts: int
    context_tokens: int
    rows: int = 1
    row_memory: RowMemory = _NO_MEMORY
    host_compute_bytes: int = 0
    graph_bytes: int = 0
    chunk_tokens: int = DEFAULT_PREFILL_CHUNK
    chunk: ChunkChoice | None = None

    @property
    def kv_remark(self) -> str:
        if self.rows == 1:
            return f"{self.context_tokens} tokens (--ctx)"
        tokens = (self.kv_bytes - self.rows * self.row_memory.fixed) // max(1, self.row_memory.per_token)
        return f"{self.rows} rows with {max(0, tokens)} tokens together, each at most {self.context_tokens} (--ctx)"

    @property
    def activation_remark(self) -> str:
        return f"the largest forward pass: {self.chunk_tokens} tokens (--prefill-chunk)"


@dataclass(frozen=True, slots=True)
class Baseline:
    """The process before anything is loaded: ``anonymous`` memory and mapped library ``files``, in bytes."""

    anonymous: int
    files: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes where. All sizes in bytes; ``budget`` covers the whole process.

    ``left`` is what a budget that was not chosen leaves of the RAM that is free.
    """

    model: str
    device: str
    sizes: ModelSizes
    baseline: Baseline
    budget: int
    budget_chosen: bool
    slots: int
    residency_asked: float | None = None
    left: int | None = field(default=None, compare=False)

    @property
    def residency(self) -> float:
        return self.slots / self.sizes.num_experts

    @property
    def anonymous_bytes(self) -> int:
        """Memory that belongs to the process alone: everything but mapped files and the margin."""
        return _fixed_bytes(self.sizes, self.baseline) - self.baseline.files - MARGIN_BYTES + self._slot_bytes

    @property
    def _slot_bytes(self) -> int:
        return self.slots * self.sizes.slot_bytes

    def rows(self) -> list[tuple[str, int, str]]:
        """(what, bytes, remark), adding up to the budget."""
        sizes = self.sizes
        used = _fixed_bytes(sizes, self.baseline) + self._slot_bytes
        return [
            ("libraries", self.baseline.files, "mapped files of Python, torch and transformers"),
            ("process", self.baseline.anonymous, "their own memory"),
            ("skeleton", sizes.skeleton_bytes, "attention, routers, norms, shared experts, embeddings"),
            ("KV cache", sizes.kv_bytes, sizes.kv_remark),
            ("activations", sizes.activation_bytes, sizes.activation_remark),
            ("margin", MARGIN_BYTES, "allocator and threads"),
            (
                "expert slots",
                self._slot_bytes,
                f"{self.slots} of {sizes.num_experts} experts ({self.residency:.0%}), "
                f"{format_size(sizes.slot_bytes)} each",
            ),
            ("unused", self.budget - used, ""),
        ]

    def summary(self) -> list[str]:
        """Lines to read before or after the table."""
        chosen = "--ram" if self.budget_chosen else "--ram auto"
        where = (
            f"{self.model} on {self.device}: a budget of {format_size(self.budget)} ({chosen}) for the whole process"
        )
        held = f"{self.slots} expert slots hold {self.residency:.0%} of the experts"
        rest = "; all experts fit, nothing is read while answering" if self.residency == 1 else ""
        chunk = [self.sizes.chunk.summary()] if self.sizes.chunk is not None else []
        return [where + left_to_others(self.left, "RAM"), held + rest, *chunk]

    def to_json(self) -> dict[str, Any]:
        names = ("libraries", "process", "skeleton", "kv_cache", "activations", "margin", "expert_slots", "unused")
        return {
            "model": self.model,
            "device": self.device,
            "ram_budget_bytes": self.budget,
            "ram_left_bytes": self.left,
            "anonymous_bytes": self.anonymous_bytes,
            "context_tokens": self.sizes.context_tokens,
            "chunk_tokens": self.sizes.chunk_tokens,
            "experts": self.sizes.num_experts,
            "slot_bytes": self.sizes.slot_bytes,
            "expert_slots": self.slots,
            "residency": self.residency,
            "bytes": {name: row[1] for name, row in zip(names, self.rows(), strict=True)},
        }


def make_plan(
    model: str,
    device: str,
    sizes: ModelSizes,
    baseline: Baseline,
    available: int,
    ram: int | None = None,
    residency: float | None = None,
) -> Plan:
    """Divide a RAM budget: everything that must be resident first, the rest becomes slots.

    ``ram`` None takes 90 % of what the process may have (``available`` bytes beside what it has already), but no more
    than the model can use. ``residency`` caps the share of experts that get slots. Raises BudgetError, naming the
    smallest budget that works, if not even one slot fits.
    """
    fixed = _fixed_bytes(sizes, baseline)
    smallest = fixed + sizes.slot_bytes
    most = sizes.num_experts if residency is None else max(1, round(sizes.num_experts * residency))
    ceiling = (available + baseline.anonymous + baseline.files) * 9 // 10
    budget = ram if ram is not None else min(ceiling, fixed + most * sizes.slot_bytes)
    if budget < smallest:
        needed = f"{-(-smallest // 2**20)}MiB"
        if ram is not None:
            raise BudgetError(
                f"--ram {format_size(ram)} is too small for {model} at {sizes.context_tokens} tokens of context: "
                f"the smallest that works is --ram {needed} (a smaller --ctx or --prefill-chunk needs less)"
            )
        raise BudgetError(
            f"{model} needs at least {needed} at {sizes.context_tokens} tokens of context, but only "
            f"{format_size(ceiling)} are available; close other programs, or try a smaller --ctx or --prefill-chunk"
        )
    slots = min(most, (budget - fixed) // sizes.slot_bytes)
    left = None if ram is not None else available + baseline.anonymous + baseline.files - budget
    return Plan(model, device, sizes, baseline, budget, ram is not None, slots, residency, left)


def left_to_others(left: int | None, what: str) -> str:
    """The end of a line about a budget."""
    return "" if left is None else f"; {format_size(left)} of the free {what} are left to the desktop and others"


def _fixed_bytes(sizes: ModelSizes, baseline: Baseline) -> int:
    """Everything but the slots."""
    return (
        baseline.files
        + baseline.anonymous
        + sizes.skeleton_bytes
        + sizes.kv_bytes
        + sizes.activation_bytes
        + MARGIN_BYTES
    )
