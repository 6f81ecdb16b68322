"""The contract of a device: where slots live, how a record gets there, and what runs at the same time as what.

Copies and kernels of a device with memory of its own run beside the CPU. Their order is kept by fences alone: a copy
into a slot waits for the fence of the slot's last use, and kernels wait for the fence of the copy.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cache.machines import Machine
    from cache.misses import MissRates
    from offload.checkpoint.formats import WeightFormat
    from offload.compute.base import ExpertCompute
    from offload.compute.grouped import GroupedKernels
    from offload.devices.clock import LoadTiming
    from offload.devices.graphs import GraphRecorder

OnProgress = Callable[[int, int], None]


class Fence(ABC):
    """A point in the order of one lane of the device: everything before it is done, or not yet."""

    @abstractmethod
    def done(self) -> bool: ...

    @abstractmethod
    def wait(self) -> None:
        """Let the calling thread wait for it. Raises what went wrong before it."""


class SlotArena(ABC):
    """Slot numbers for ``slots`` records of at most ``slot_bytes`` each on the device, not all of them with memory.

    ``segment_slots`` slots are allocated and given back together. Slots may be given back and taken again one segment
    at a time; their numbers stay what they are.
    """

    slots: int
    slot_bytes: int
    segment_slots: int = 1

    @property
    @abstractmethod
    def available(self) -> list[int]:
        """The slots that have memory, ascending."""

    @abstractmethod
    def buffer(self, slot: int) -> memoryview:
        """Writable host memory, 4 KiB aligned and ``slot_bytes`` long, that a read for this slot goes into.

        For devices whose slots are host memory; others have a :class:`Link`.
        """

    @abstractmethod
    def tensor(self, slot: int) -> torch.Tensor:
        """The slot as uint8[slot_bytes] on the device."""

    @abstractmethod
    def touch(self, on_progress: OnProgress) -> None:
        """Make the system back every page now, so that no decode step pays for it; reports (done, total) bytes.

        Raises BudgetError if the system refuses the memory.
        """

    @abstractmethod
    def release(self, slots: Sequence[int]) -> None:
        """Give the memory of these slots, whole segments, back. Nothing may use them until :meth:`restore`."""

    @abstractmethod
    def restore(self, slots: Sequence[int]) -> list[int]:
        """Take memory for slots that were released, whole segments; returns those that could be had."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back. No tensor of the arena may be used afterwards."""


class HostArena(ABC):
    """Buffers in host memory that disk reads go into and that the device copies from (pinned where it can be)."""

    slots: int
    slot_bytes: int
    pinned: bool

    @abstractmethod
    def writable(self, slot: int) -> memoryview:
        """The buffer for a read, 4 KiB aligned; every copy from or to it must be done."""

    @abstractmethod
    def tensor(self, slot: int) -> torch.Tensor:
        """The buffer as uint8[slot_bytes] for the CPU to read; what is copied down to it must have arrived."""

    @abstractmethod
    def release(self, slots: Sequence[int]) -> None:
        """Give the memory of these buffers back to the system until they are written again."""

    @abstractmethod
    def close(self) -> None: ...


class Link(ABC):
    """Copies between host buffers and slots. May be called from several threads."""

    @abstractmethod
    def upload(self, source: int, slot: int, size: int, after: Sequence[Fence]) -> Fence:
        """Start copying ``size`` bytes of the host buffer ``source`` into ``slot``, once ``after`` are done."""

    @abstractmethod
    def download(self, slot: int, target: int, size: int, after: Sequence[Fence]) -> Fence:
        """The other way round."""

    @abstractmethod
    def join(self, fence: Fence) -> None:
        """Kernels that are launched from now on wait for ``fence``."""

    @abstractmethod
    def computed(self, slots: Sequence[int]) -> Fence:
        """A fence behind all kernels launched so far; the last of them read ``slots``."""

    @abstractmethod
    def stall_seconds(self) -> float:
        """Time so far that kernels waited for copies, as far as it is known by now."""


class Passage(ABC):
    """Small tensors between device and host, beside the kernels: inputs down, and up what the CPU made of them."""

    @abstractmethod
    def down(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start copying ``tensor``, which must stay as it is until the copy was taken.

        What is returned waits for the copy and gives it, a tensor on the CPU that is good until the next :meth:`down`.
        """

    @abstractmethod
    def up(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` on the device, for kernels that are launched from now on; it may change once this returns."""

    def computed(self, moved: int, flops: float) -> None:  # noqa: B027 - the time of a real device passes by itself
        """The CPU computed with an expert of ``moved`` bytes, which took it ``flops`` operations."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Give its buffers back."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of the device's own memory: used now, at most so far, and the budget that is never exceeded.

    All three count what the context and the libraries take (:meth:`Device.reserved_bytes`), as ``--vram`` does.
    """

    used: int
    peak: int
    budget: int


class Device(ABC):
    """One device. The only place that knows where memory lives, streams, events and pinning.

    ``unified``: slots are host memory, and neither link nor host tier exists. ``virtual``: its clock does not tell
    the time that passed but the time that a named machine would have taken.
    """

    name: str
    torch_device: torch.device
    load_device: torch.device
    """Where the loader puts weights; :meth:`place` takes them from there."""
    unified: bool = True
    virtual: bool = False
    machine: Machine | None = None
    """The named machine that it stands for, if it does."""
    has_graphs: bool = False
    """Whether :meth:`graphs` gives something."""
    groups_attention: bool = True
    """Whether runs with quantised weights attend as ``model/attention.py`` does; a GPU has better."""

    @abstractmethod
    def allocate_slots(self, slots: int, slot_bytes: int, most: int | None = None) -> SlotArena:
        """An arena with ``slots`` slots, to be grown to ``most`` at times; ``slot_bytes`` is a multiple of 4096.

        A device with memory of its own may give fewer slots if it refuses more. Raises BudgetError if there is no room
        at all.
        """

    def allocate_host(self, slots: int, slot_bytes: int, most: int) -> HostArena:
        """Buffers for the host tier. Raises BudgetError if the system refuses them."""
        raise NotImplementedError(f"{self.name} has no host tier")

    def link(self, arena: SlotArena, host: HostArena) -> Link:
        raise NotImplementedError(f"{self.name} has no link")

    def passage(self) -> Passage:
        raise NotImplementedError(f"{self.name} computes on the CPU itself")

    def miss_rates(self, host: HostArena, of_cpu: Callable[[], tuple[float, float]]) -> MissRates:
        """What the choice between copying and computing on the CPU goes by; between two events.

        ``of_cpu`` gives (bytes of weights, operations) a second of this machine's CPU; it may take seconds.
        """
        raise NotImplementedError(f"{self.name} computes on the CPU itself")

    def total_memory(self) -> int | None:
        """The device's own memory in bytes; None if it has none."""
        return None

    def free_memory(self) -> int | None:
        """Bytes of it that are free for this process."""
        return None

    def reserved_bytes(self) -> int:
        """Bytes of it that the context and the libraries take before anything is allocated."""
        return 0

    def set_budget(self, size: int) -> None:  # noqa: B027 - a device without memory of its own has nothing to bound
        """Never let this process allocate more than ``size`` bytes of the device's memory, beside the context."""

    def memory(self) -> DeviceMemory | None:
        """What this process has of the device's own memory."""
        return None

    def place(self, model: PreTrainedModel) -> None:  # noqa: B027 - nothing to do where the loader put it
        """Bring what the loader left on ``load_device`` to the device. Changes ``model``."""

    def running(self) -> AbstractContextManager[object]:
        """Surrounds every forward pass."""
        return nullcontext()

    def experts(self, compute: ExpertCompute) -> ExpertCompute:
        """``compute`` as this device launches it."""
        return compute

    def grouped_kernels(
        self, weight_format: WeightFormat, dtype: torch.dtype, failed: Callable[[str], None]
    ) -> GroupedKernels | None:
        """What multiplies with all of an event's experts at once, where the device has such kernels for them.

        Where it should have them but they do not work, ``failed`` is told why.
        """
        return None

    def graphs(self, dtype: torch.dtype) -> GraphRecorder | None:
        """What records operations to launch them together, for a model of ``dtype``, where the device can do that."""
        return None

    def card(self) -> str | None:
        """What graphs were tried on and what they depend on, where that must be known: card, driver, torch."""
        return None

    def out_of_memory(self, error: BaseException) -> bool:
        """Whether ``error`` says that the device's own memory is used up."""
        return False

    def recover(self) -> None:  # noqa: B027 - nothing runs beside the caller where slots are host memory
        """After its memory was used up: wait for all that was launched, forget its errors, give back what is spare."""

    def now(self) -> float:
        """Seconds on the device's clock, from any start."""
        return time.perf_counter()

    def plan_load(self, disk_bytes: int, link_bytes: int, prefetch: bool, after: Sequence[Fence]) -> LoadTiming | None:
        """When a load that starts now would arrive, on a device with a virtual clock."""
        return None

    def close(self) -> None:  # noqa: B027 - most have nothing to stop
        """Stop its workers and give everything back."""
