"""Slots, host buffers and copies of the pretend GPU, and the check that nothing is touched too early."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

from offload.config import format_size
from offload.devices.base import Fence, HostArena, Link, OnProgress, Passage, SlotArena
from offload.devices.clock import VirtualClock
from offload.devices.host_memory import HostMemory
from offload.devices.segments import segment_slots, segments_of
from offload.devices.simulated.streams import SimFence, SimStream
from offload.devices.simulated.tensor import SimTensor, SimulatedError, VramExhausted, World, to_device
from offload.errors import BudgetError

POISON = 0xFF


class SimSlotArena(SlotArena):
    """Segments in host memory that count as the device's."""

    def __init__(self, world: World, slots: int, slot_bytes: int, most: int) -> None:
        self.slots = most
        self.slot_bytes = slot_bytes
        self.segment_slots = segment_slots(slots, slot_bytes)
        self.filled: dict[int, SimFence] = {}  # slot -> the copy that filled it, until a kernel may read it
        self.used: dict[int, list[SimFence]] = {}  # slot -> what reads it: the last kernel, the last copy to the host
        self._world = world
        self._segments: dict[int, SimTensor] = {}
        self.restore(range(slots // self.segment_slots * self.segment_slots))
        if not self._segments:
            raise BudgetError(
                f"the simulated device has no room for {self.segment_slots} expert slots of {format_size(slot_bytes)}; "
                "give a larger --vram"
            )

    @property
    def available(self) -> list[int]:
        """Slots that have memory."""
        return [slot for segment in sorted(self._segments) for slot in self._slots_of(segment)]

    def buffer(self, slot: int) -> memoryview:
        raise SimulatedError("the host cannot write to the device's memory; copy over the link")

    def tensor(self, slot: int) -> torch.Tensor:
        segment = self._segments[slot // self.segment_slots]
        start = slot % self.segment_slots * self.slot_bytes
        return to_device(segment.elem[start : start + self.slot_bytes], self._world)

    def bytes(self, slot: int) -> torch.Tensor:
        """The slot as the copies and the checks see it."""
        start = slot % self.segment_slots * self.slot_bytes
        return self._segments[slot // self.segment_slots].elem[start : start + self.slot_bytes]

    def read_by(self, slot: int, fence: SimFence) -> None:
        """What runs before ``fence`` reads the slot."""
        others = [reader for reader in self.used.get(slot, []) if reader.stream is not fence.stream]
        self.used[slot] = [*others, fence]

    def slots_at(self, addresses: Sequence[int]) -> set[int]:
        """The slots that these addresses lie in."""
        found = set()
        starts = {segment.elem.data_ptr(): number for number, segment in self._segments.items()}
        for address in addresses:
            start = max((start for start in starts if start <= address), default=None)
            inside = None if start is None else (address - start) // self.slot_bytes
            if start is None or inside is None or inside >= self.segment_slots:
                raise SimulatedError("a kernel reads memory that was given back")
            found.add(starts[start] * self.segment_slots + inside)
        return found

    def touch(self, on_progress: OnProgress) -> None:
        total = len(self._segments)
        for done, segment in enumerate(self._segments.values(), 1):
            segment.elem.fill_(POISON)
            on_progress(done * segment.elem.nbytes, total * segment.elem.nbytes)

    def release(self, slots: Sequence[int]) -> None:
        for segment in segments_of(slots, self.segment_slots, self.slots):
            for slot in self._slots_of(segment):
                filled = self.filled.pop(slot, None)
                for fence in (*self.used.pop(slot, []), *([filled] if filled is not None else [])):
                    if not fence.done():
                        raise SimulatedError(f"slot {slot} is given back while it is in use")
            del self._segments[segment]

    def restore(self, slots: Sequence[int]) -> list[int]:
        size = self.segment_slots * self.slot_bytes
        got: list[int] = []
        for segment in sorted({slot // self.segment_slots for slot in slots}):
            if segment not in self._segments:
                try:
                    memory = torch.full((size,), POISON, dtype=torch.uint8)
                    self._segments[segment] = to_device(memory, self._world)
                except VramExhausted:
                    break
                got += self._slots_of(segment)
        return got

    def close(self) -> None:
        self._segments.clear()

    def _slots_of(self, segment: int) -> range:
        return range(segment * self.segment_slots, min(self.slots, (segment + 1) * self.segment_slots))


class SimHostArena(HostArena):
    """Host buffers that know which copies read from them or write to them."""

    pinned = True

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.busy: dict[int, SimFence] = {}
        self.arriving: dict[int, SimFence] = {}  # the last copy down to each buffer
        self._memory = HostMemory(slots, slot_bytes, "the host tier", used=0)

    def writable(self, slot: int) -> memoryview:
        fence = self.busy.get(slot)
        if fence is not None and fence.number > fence.stream.observed:
            raise SimulatedError(f"host buffer {slot} is used again before a copy from or to it is known to be done")
        return self._memory.buffer(slot)

    def array(self, slot: int) -> np.ndarray:
        return self._memory.array(slot)

    def tensor(self, slot: int) -> torch.Tensor:
        fence = self.arriving.get(slot)
        if fence is not None and fence.number > fence.stream.observed:
            raise SimulatedError(f"the CPU reads host buffer {slot} before its record is known to be there")
        return torch.from_numpy(self._memory.array(slot))

    def release(self, slots: Sequence[int]) -> None:
        self._memory.release(slots)

    def close(self) -> None:
        self._memory.close()


class SimPassage(Passage):
    """As copies that the engine thread waits for."""

    def __init__(self, world: World, device: torch.device) -> None:
        self._clock = world.clock
        self._device = device

    def down(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        copy = tensor.to("cpu")
        self._clock.host(self._clock.machine.load_s)
        return lambda: copy

    def up(self, tensor: torch.Tensor) -> torch.Tensor:
        self._clock.host(self._clock.machine.load_s)
        return tensor.to(self._device)

    def computed(self, moved: int, flops: float) -> None:
        self._clock.host_expert(moved, flops)


class SimLink(Link):
    def __init__(
        self, world: World, arena: SimSlotArena, host: SimHostArena, kernels: SimStream, up: SimStream, down: SimStream
    ) -> None:
        self._world = world
        self._arena = arena
        self._host = host
        self._kernels, self._up, self._down = kernels, up, down
        self._lock = threading.Lock()  # checking and launching are one step
        self.hold = threading.Event()  # tests let copies wait for it
        self.hold.set()

    @property
    def _clock(self) -> VirtualClock:
        return self._world.clock

    def upload(self, source: int, slot: int, size: int, after: Sequence[Fence]) -> Fence:
        with self._lock:
            for reader in self._arena.used.get(slot, []):
                self._check(self._up, after, reader, f"slot {slot} is overwritten while it is in use")
            self._check(self._up, after, self._host.busy.get(source), f"host buffer {source} has not arrived yet")
            target, origin = self._arena.bytes(slot), self._host.array(source)

            def copy() -> None:
                target.fill_(POISON)
                self.hold.wait()
                target[:size] = torch.from_numpy(origin[:size])

            times = [fence.time for fence in after if isinstance(fence, SimFence)]
            fence = self._up.launch(copy, after, max(times, default=0.0))
            self._host.busy[source] = self._arena.filled[slot] = fence
            self._arena.used.pop(slot, None)
            self._world.uploaded += size
        return fence

    def download(self, slot: int, target: int, size: int, after: Sequence[Fence]) -> Fence:
        with self._lock:
            filled = self._arena.filled.get(slot)
            self._check(self._down, after, filled, f"slot {slot} is copied before its record is there")
            self._check(self._down, after, self._host.busy.get(target), f"host buffer {target} is still in use")
            origin, goal = self._arena.bytes(slot), self._host.array(target)
            times = [fence.time for fence in after if isinstance(fence, SimFence)]
            done_at = self._clock.download(size, max(times, default=0.0))

            def copy() -> None:
                self.hold.wait()
                torch.from_numpy(goal[:size]).copy_(origin[:size])

            fence = self._down.launch(copy, after, done_at)
            self._host.busy[target] = self._host.arriving[target] = fence
            self._arena.read_by(slot, fence)
            self._world.downloaded += size
        return fence

    def join(self, fence: Fence) -> None:
        assert isinstance(fence, SimFence)
        if not self._kernels.ordered_after(fence):
            self._kernels.join(fence)

    def computed(self, slots: Sequence[int]) -> Fence:
        return self._kernels.fence(self._clock.kernels_free_at)

    def stall_seconds(self) -> float:
        return self._clock.stall_link

    @staticmethod
    def _check(stream: SimStream, after: Sequence[Fence], needed: SimFence | None, problem: str) -> None:
        if needed is None or stream.ordered_after(needed):
            return
        covered = (f.stream is needed.stream and f.number >= needed.number for f in after if isinstance(f, SimFence))
        if not any(covered):
            raise SimulatedError(problem)
