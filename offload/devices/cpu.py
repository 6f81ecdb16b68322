"""The CPU: slots are RAM, and a read goes straight into its slot."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable

import numpy as np
import torch

from offload.config import format_size
from offload.devices.base import Device, SlotArena
from offload.errors import BudgetError

_TOUCH_BYTES = 64 * 2**20


class CpuSlotArena(SlotArena):
    """One anonymous mapping: page aligned, and given back to the system as a whole."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        try:
            # private: shared anonymous memory would be counted as shmem and get no huge pages
            self._map = mmap.mmap(-1, slots * slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise BudgetError(
                f"the system refuses {format_size(slots * slot_bytes)} for expert slots ({error}); give a smaller --ram"
            ) from error
        with contextlib.suppress(AttributeError, OSError):  # fewer page faults and table walks; not everywhere
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = memoryview(self._map)
        # not torch.frombuffer: it does not keep the mapping from being closed under a live tensor
        self._tensor = torch.from_numpy(np.frombuffer(self._map, dtype=np.uint8))

    def buffer(self, slot: int) -> memoryview:
        return self._bytes[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def tensor(self, slot: int) -> torch.Tensor:
        return self._tensor[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def touch(self, on_progress: Callable[[int, int], None]) -> None:
        total = self._tensor.numel()
        for start in range(0, total, _TOUCH_BYTES):
            self._tensor[start : start + _TOUCH_BYTES].zero_()
            on_progress(min(start + _TOUCH_BYTES, total), total)

    def close(self) -> None:
        del self._tensor
        self._bytes.release()
        with contextlib.suppress(BufferError):  # a tensor still looks into it: the map goes with the last of them
            self._map.close()


class CpuDevice(Device):
    name = "cpu"
    torch_device = torch.device("cpu")

    def allocate_slots(self, slots: int, slot_bytes: int) -> SlotArena:
        return CpuSlotArena(slots, slot_bytes)
