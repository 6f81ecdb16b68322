"""The contract of a device: where slots live and how a record gets there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch


class SlotArena(ABC):
    """Room for ``slots`` records of at most ``slot_bytes`` each, allocated once."""

    slots: int
    slot_bytes: int

    @abstractmethod
    def buffer(self, slot: int) -> memoryview:
        """Writable host memory, 4 KiB aligned and ``slot_bytes`` long, that a read for this slot goes into."""

    @abstractmethod
    def tensor(self, slot: int) -> torch.Tensor:
        """The slot as uint8[slot_bytes] on the device."""

    @abstractmethod
    def touch(self, on_progress: Callable[[int, int], None]) -> None:
        """Make the system back every page now, so that no decode step pays for it; reports (done, total) bytes.

        Raises BudgetError if the system refuses the memory.
        """

    @abstractmethod
    def close(self) -> None:
        """Give the memory back. No tensor of the arena may be used afterwards."""


class Device(ABC):
    """One device. The only place that knows where memory lives, and later streams, events and pinning."""

    name: str
    torch_device: torch.device

    @abstractmethod
    def allocate_slots(self, slots: int, slot_bytes: int) -> SlotArena:
        """``slot_bytes`` is a multiple of 4096. Raises BudgetError if there is not enough address space."""
