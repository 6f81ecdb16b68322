"""The CPU: slots are RAM, and a read goes straight into its slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offload.devices.base import Device, OnProgress, SlotArena
from offload.devices.host_memory import HostMemory

_TOUCH_BYTES = 64 * 2**20


class CpuSlotArena(SlotArena):
    """One anonymous mapping. ``slots`` of it are touched; the rest, up to ``most``, is address space until used."""

    def __init__(self, slots: int, slot_bytes: int, most: int | None = None) -> None:
        self.slots = max(slots, most or 0)
        self.slot_bytes = slot_bytes
        self._memory = HostMemory(self.slots, slot_bytes, used=slots)
        self._available = set(range(slots))
        self._tensor = torch.from_numpy(self._memory.array())

    @property
    def available(self) -> list[int]:
        return sorted(self._available)

    def buffer(self, slot: int) -> memoryview:
        return self._memory.buffer(slot)

    def tensor(self, slot: int) -> torch.Tensor:
        return self._tensor[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def touch(self, on_progress: OnProgress) -> None:
        total = len(self._available) * self.slot_bytes
        for start in range(0, total, _TOUCH_BYTES):
            end = min(start + _TOUCH_BYTES, total)
            self._tensor[start:end].zero_()
            on_progress(end, total)

    def release(self, slots: Sequence[int]) -> None:
        self._memory.release(slots)
        self._available.difference_update(slots)

    def restore(self, slots: Sequence[int]) -> list[int]:
        for slot in slots:
            self.tensor(slot).zero_()
        self._available.update(slots)
        return list(slots)

    def close(self) -> None:
        del self._tensor
        self._memory.close()


class CpuDevice(Device):
    name = "cpu"
    torch_device = load_device = torch.device("cpu")

    def allocate_slots(self, slots: int, slot_bytes: int, most: int | None = None) -> SlotArena:
        return CpuSlotArena(slots, slot_bytes, most)
