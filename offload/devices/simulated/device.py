"""A pretend GPU on the CPU: real numbers, the order of a GPU's work, and the time that a named machine would take."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from cache.machines import Machine
from cache.misses import MissRates
from offload.compute.matrix import QuantizedMatrix
from offload.devices.base import Device, DeviceMemory, Fence, HostArena, Link, Passage, SlotArena
from offload.devices.clock import LoadTiming, VirtualClock
from offload.devices.graphs import GraphRecorder
from offload.devices.on_paper import CONTEXT_BYTES
from offload.devices.simulated.arena import SimHostArena, SimLink, SimPassage, SimSlotArena
from offload.devices.simulated.graphs import SimGraphs
from offload.devices.simulated.kernels import SimExperts
from offload.devices.simulated.streams import SimFence, SimStream
from offload.devices.simulated.tensor import (
    DEVICE_TYPE,
    Vram,
    VramExhausted,
    World,
    made_on_device,
    register_device,
    to_device,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from offload.compute.base import ExpertCompute


class SimulatedDevice(Device):
    unified = False
    virtual = True
    has_graphs = True

    def __init__(self, machine: Machine) -> None:
        register_device()
        self.name = f"simulated:{machine.name}"
        self.machine: Machine = machine
        self.torch_device = torch.device(DEVICE_TYPE, 0)
        self.load_device = torch.device("cpu")
        self.clock = VirtualClock(machine)
        self.vram = Vram(machine.vram_bytes)
        self.world = World(self.vram, self.clock)
        self._kernels, self._up, self._down = (SimStream(name) for name in ("kernels", "upload", "download"))
        self._arena: SimSlotArena | None = None

    def allocate_slots(self, slots: int, slot_bytes: int, most: int | None = None) -> SlotArena:
        self._arena = SimSlotArena(self.world, slots, slot_bytes, max(slots, most or 0))
        return self._arena

    def allocate_host(self, slots: int, slot_bytes: int, most: int) -> HostArena:
        return SimHostArena(most, slot_bytes)

    def link(self, arena: SlotArena, host: HostArena) -> Link:
        assert isinstance(arena, SimSlotArena) and isinstance(host, SimHostArena)
        return SimLink(self.world, arena, host, self._kernels, self._up, self._down)

    def passage(self) -> Passage:
        return SimPassage(self.world, self.torch_device)

    def miss_rates(self, host: HostArena, of_cpu: Callable[[], tuple[float, float]]) -> MissRates:
        return MissRates.of_machine(self.machine)

    def total_memory(self) -> int | None:
        return self.machine.vram_bytes

    def free_memory(self) -> int | None:
        return self.vram.total - self.vram.used

    def reserved_bytes(self) -> int:
        return CONTEXT_BYTES

    def set_budget(self, size: int) -> None:
        # A card gives a kernel its memory as it is launched; these take theirs as they run. What a pass that was given
        # up has launched must not ask for memory under the new budget.
        self._drain()
        self.vram.budget = size

    def memory(self) -> DeviceMemory | None:
        used, peak, budget = (size + CONTEXT_BYTES for size in (self.vram.used, self.vram.peak, self.vram.budget))
        return DeviceMemory(used, peak, min(budget, self.vram.total))

    @torch.inference_mode()  # or views of what is placed could not be taken in inference mode
    def place(self, model: PreTrainedModel) -> None:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    placed = torch.nn.Parameter(to_device(parameter.data, self.world), requires_grad=False)
                    module._parameters[name] = placed
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = to_device(buffer, self.world)
            for name, value in list(vars(module).items()):  # quantised weights are neither
                if isinstance(value, torch.Tensor | QuantizedMatrix):
                    setattr(module, name, self._placed(value))

    def running(self) -> AbstractContextManager[object]:
        return made_on_device(self.world)

    def experts(self, compute: ExpertCompute) -> ExpertCompute:
        assert self._arena is not None
        return SimExperts(compute, self.world, self._kernels, self._arena)

    def graphs(self, dtype: torch.dtype) -> GraphRecorder:
        return SimGraphs(self.clock)

    def out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, VramExhausted)

    def recover(self) -> None:
        self._drain()
        gc.collect()  # what the failed pass left

    def now(self) -> float:
        return self.clock.now

    def plan_load(self, disk_bytes: int, link_bytes: int, prefetch: bool, after: Sequence[Fence]) -> LoadTiming | None:
        times = [fence.time for fence in after if isinstance(fence, SimFence)]
        return self.clock.load(disk_bytes, link_bytes, prefetch, max(times, default=0.0))

    def close(self) -> None:
        for stream in (self._kernels, self._up, self._down):
            stream.close()

    def _drain(self) -> None:
        """Wait for all that was launched. That it found no memory, nobody needs to know any more."""
        for stream in (self._up, self._down, self._kernels):
            with contextlib.suppress(VramExhausted):
                stream.synchronize()

    def _placed(self, value: Any) -> Any:
        if isinstance(value, QuantizedMatrix):
            return QuantizedMatrix(
                value.layout, to_device(value.codes, self.world), to_device(value.params, self.world)
            )
        return to_device(value, self.world)
