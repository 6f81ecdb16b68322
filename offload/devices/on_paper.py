"""A device that is only planned for: a named machine's sizes, nothing to allocate."""

from __future__ import annotations

import torch

from cache.machines import Machine
from offload.devices.base import Device, SlotArena

CONTEXT_BYTES = 512 * 2**20
"""What a CUDA context, cuBLAS and its workspaces take of a card."""


class PaperDevice(Device):
    unified = False
    has_graphs = True

    def __init__(self, machine: Machine) -> None:
        self.name = machine.title
        self.machine: Machine = machine
        self.torch_device = self.load_device = torch.device("meta")

    def allocate_slots(self, slots: int, slot_bytes: int, most: int | None = None) -> SlotArena:
        raise NotImplementedError("this device is on paper only")

    def total_memory(self) -> int:
        return self.machine.vram_bytes

    def free_memory(self) -> int:
        return self.machine.vram_bytes

    def reserved_bytes(self) -> int:
        return CONTEXT_BYTES
