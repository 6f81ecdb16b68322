"""A CUDA card: slots in segments of VRAM, pinned host buffers, and a stream for each direction of the link.

Kernels run on the current stream. A copy up waits for the event behind the slot's last kernels, and kernels wait for
the copy's event; nothing else is synchronised. What the card allocates is bounded by
``set_per_process_memory_fraction``, so that a request beyond the budget fails instead of taking other programs' memory.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from cache.misses import MissRates
from offload.config import format_size
from offload.devices.base import Device, DeviceMemory, Fence, HostArena, Link, OnProgress, Passage, SlotArena
from offload.devices.cuda_passage import CudaPassage, measure
from offload.devices.host_memory import HostMemory
from offload.devices.segments import segment_slots, segments_of
from offload.errors import BudgetError, DeviceError, UsageError

if TYPE_CHECKING:
    from offload.checkpoint.formats import WeightFormat
    from offload.compute.grouped import GroupedKernels
    from offload.devices.graphs import GraphRecorder

_LIBRARIES_BYTES = 256 * 2**20
"""cuBLAS, its workspaces, and kernels that are loaded at their first use; the context is there when this is asked."""
_PIN_BYTES = 16 * 2**20
"""What is pinned by one call, about: each call has a price, and what is pinned is taken from the system at once."""
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context


def cuda_is_there() -> bool:
    return bool(torch.cuda.is_available())


def open_cuda(detail: str) -> Device:
    """Card number ``detail`` (default 0). Raises UsageError for what is no number, DeviceError if it is not there."""
    if detail and not detail.isdigit():
        raise UsageError(f"--device: 'cuda:{detail}' is not a card; write cuda or, for the second card, cuda:1")
    if not cuda_is_there():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "the driver offers no card"
        raise DeviceError(f"--device cuda: {why}; install torch with CUDA and NVIDIA's driver, or use --device cpu")
    number = int(detail or 0)
    if number >= torch.cuda.device_count():
        raise DeviceError(f"--device cuda:{number}: there are {torch.cuda.device_count()} cards, counted from 0")
    return CudaDevice(number)


class CudaFence(Fence):
    def __init__(self, event: Any) -> None:
        self.event = event

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()


class CudaSlotArena(SlotArena):
    """One tensor for each segment, so that a segment can be given back."""

    def __init__(self, device: torch.device, slots: int, slot_bytes: int, most: int) -> None:
        self.slots = most
        self.slot_bytes = slot_bytes
        self.segment_slots = segment_slots(slots, slot_bytes)
        self._device = device
        self._segments: dict[int, torch.Tensor] = {}
        self.restore(range(slots // self.segment_slots * self.segment_slots))
        if not self._segments:
            size = format_size(self.segment_slots * slot_bytes)
            raise BudgetError(f"the card refuses {size} for expert slots; give a larger --vram or a smaller --ctx")

    @property
    def available(self) -> list[int]:
        return [slot for segment in sorted(self._segments) for slot in self._slots_of(segment)]

    def buffer(self, slot: int) -> memoryview:
        raise DeviceError("the host cannot write to the card's memory; copy over the link")

    def tensor(self, slot: int) -> torch.Tensor:
        start = slot % self.segment_slots * self.slot_bytes
        return self._segments[slot // self.segment_slots][start : start + self.slot_bytes]

    def touch(self, on_progress: OnProgress) -> None:
        total = len(self.available) * self.slot_bytes
        on_progress(total, total)  # the card backs memory when it is allocated

    def release(self, slots: Sequence[int]) -> None:
        for segment in segments_of(slots, self.segment_slots, self.slots):
            del self._segments[segment]
        torch.cuda.empty_cache()

    def restore(self, slots: Sequence[int]) -> list[int]:
        got: list[int] = []
        for segment in sorted({slot // self.segment_slots for slot in slots}):
            if segment in self._segments:
                continue
            try:
                size = self.segment_slots * self.slot_bytes
                self._segments[segment] = torch.empty(size, dtype=torch.uint8, device=self._device)
            except torch.cuda.OutOfMemoryError:
                break
            got += self._slots_of(segment)
        return got

    def close(self) -> None:
        self._segments.clear()

    def _slots_of(self, segment: int) -> range:
        return range(segment * self.segment_slots, min(self.slots, (segment + 1) * self.segment_slots))


class CudaHostArena(HostArena):
    """Our own mapping, pinned by us: torch's pinned allocator rounds every request up to a power of two.

    Buffers are pinned in groups when one of them is first written, so that the plan's host tier costs no more than it
    holds. Where pinning fails (``ulimit -l``), they stay pageable: copies are slower, and the CPU waits for them.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._memory = HostMemory(slots, slot_bytes, "the host tier", used=0)
        self._tensor = torch.from_numpy(self._memory.array())
        self._group = max(1, _PIN_BYTES // slot_bytes)
        self._pinned: set[int] = set()
        self._lock = threading.Lock()
        self.pinned = True
        self._pin(slots - 1)  # the staging buffers; and it tells whether pinning works

    def writable(self, slot: int) -> memoryview:
        if self.pinned:
            self._pin(slot)
        return self._memory.buffer(slot)

    def tensor(self, slot: int) -> torch.Tensor:
        return self._tensor[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def release(self, slots: Sequence[int]) -> None:
        """Groups of which no buffer is left are unpinned and given back."""
        gone = set(slots)
        with self._lock:
            for group in {slot // self._group for slot in gone}:
                members = self._members(group)
                if gone.issuperset(members):
                    self._unpin(group)
                    self._memory.release(members)

    def close(self) -> None:
        with self._lock:
            for group in list(self._pinned):
                self._unpin(group)
        del self._tensor
        self._memory.close()

    def _members(self, group: int) -> range:
        return range(group * self._group, min(self.slots, (group + 1) * self._group))

    def _pin(self, slot: int) -> None:
        group = slot // self._group
        with self._lock:
            if group in self._pinned or not self.pinned:
                return
            members = self._members(group)
            address = self._tensor.data_ptr() + members.start * self.slot_bytes
            if int(torch.cuda.cudart().cudaHostRegister(address, len(members) * self.slot_bytes, _PORTABLE)) != 0:
                self.pinned = False
                return
            self._pinned.add(group)

    def _unpin(self, group: int) -> None:
        if group in self._pinned:
            self._pinned.remove(group)
            address = self._tensor.data_ptr() + self._members(group).start * self.slot_bytes
            torch.cuda.cudart().cudaHostUnregister(address)


class CudaLink(Link):
    def __init__(self, device: torch.device, arena: CudaSlotArena, host: CudaHostArena) -> None:
        self._device = device
        self._arena = arena
        self._host = host
        self._up = torch.cuda.Stream(device)
        self._down = torch.cuda.Stream(device)
        self._lock = threading.Lock()  # a copy and its event go together
        self._waits: deque[tuple[Any, Any]] = deque()  # events before and after a wait of the kernels
        self._stalled = 0.0

    def upload(self, source: int, slot: int, size: int, after: Sequence[Fence]) -> Fence:
        return self._copy(self._up, self._arena.tensor(slot)[:size], self._host.tensor(source)[:size], after)

    def download(self, slot: int, target: int, size: int, after: Sequence[Fence]) -> Fence:
        self._host.writable(target)  # pinned
        return self._copy(self._down, self._host.tensor(target)[:size], self._arena.tensor(slot)[:size], after)

    def join(self, fence: Fence) -> None:
        assert isinstance(fence, CudaFence)
        if fence.done():
            return
        stream = torch.cuda.current_stream(self._device)
        before, behind = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        stream.wait_event(fence.event)
        behind.record(stream)
        self._waits.append((before, behind))

    def computed(self, slots: Sequence[int]) -> Fence:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return CudaFence(event)

    def stall_seconds(self) -> float:
        while self._waits and self._waits[0][1].query():
            before, behind = self._waits.popleft()
            self._stalled += before.elapsed_time(behind) / 1000
        return self._stalled

    def _copy(self, stream: Any, target: torch.Tensor, origin: torch.Tensor, after: Sequence[Fence]) -> Fence:
        event = torch.cuda.Event()
        with self._lock, torch.cuda.stream(stream):
            for fence in after:
                assert isinstance(fence, CudaFence)
                stream.wait_event(fence.event)
            target.copy_(origin, non_blocking=True)
            event.record(stream)
        return CudaFence(event)


class CudaDevice(Device):
    unified = False
    has_graphs = True
    groups_attention = False

    def __init__(self, number: int) -> None:
        self.torch_device = self.load_device = torch.device("cuda", number)
        self.name = f"cuda:{number}"
        torch.cuda.set_device(self.torch_device)
        torch.cuda.init()
        self._budget = self.total_memory()

    def allocate_slots(self, slots: int, slot_bytes: int, most: int | None = None) -> SlotArena:
        return CudaSlotArena(self.torch_device, slots, slot_bytes, max(slots, most or 0))

    def allocate_host(self, slots: int, slot_bytes: int, most: int) -> HostArena:
        return CudaHostArena(most, slot_bytes)

    def link(self, arena: SlotArena, host: HostArena) -> Link:
        assert isinstance(arena, CudaSlotArena) and isinstance(host, CudaHostArena)
        return CudaLink(self.torch_device, arena, host)

    def passage(self) -> Passage:
        return CudaPassage(self.torch_device)

    def miss_rates(self, host: HostArena, of_cpu: Callable[[], tuple[float, float]]) -> MissRates:
        assert isinstance(host, CudaHostArena)
        return measure(self.torch_device, host.tensor(host.slots - 1), of_cpu)

    def total_memory(self) -> int:
        return int(torch.cuda.mem_get_info(self.torch_device)[1])

    def free_memory(self) -> int:
        return int(torch.cuda.mem_get_info(self.torch_device)[0])

    def reserved_bytes(self) -> int:
        return _LIBRARIES_BYTES

    def set_budget(self, size: int) -> None:
        self._budget = size
        fraction = min(1.0, size / self.total_memory())
        torch.cuda.set_per_process_memory_fraction(fraction, self.torch_device)

    def memory(self) -> DeviceMemory | None:
        used, peak = (
            int(held(self.torch_device)) + _LIBRARIES_BYTES
            for held in (torch.cuda.memory_reserved, torch.cuda.max_memory_reserved)
        )
        return DeviceMemory(used, peak, min(self._budget + _LIBRARIES_BYTES, self.total_memory()))

    def place(self, model: Any) -> None:
        """The loader puts parameters and buffers here; quantised weights come from the CPU."""
        from offload.compute.matrix import QuantizedMatrix

        for module in model.modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, QuantizedMatrix):
                    codes, params = (part.to(self.torch_device) for part in (value.codes, value.params))
                    setattr(module, name, QuantizedMatrix(value.layout, codes, params))
                elif isinstance(value, torch.Tensor):
                    setattr(module, name, value.to(self.torch_device))

    def grouped_kernels(
        self, weight_format: WeightFormat, dtype: torch.dtype, failed: Callable[[str], None]
    ) -> GroupedKernels | None:
        from offload.compute.grouped import load_grouped

        return load_grouped(self.torch_device, weight_format, dtype, failed)

    def graphs(self, dtype: torch.dtype) -> GraphRecorder:
        from offload.devices.cuda_graphs import CudaGraphs

        return CudaGraphs(self.torch_device, dtype)

    def card(self) -> str:
        driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()  # that a build with CUDA has
        name = torch.cuda.get_device_name(self.torch_device)
        return f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, driver {driver}"

    def out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, torch.cuda.OutOfMemoryError)

    def recover(self) -> None:
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(self.torch_device)
        torch.cuda.empty_cache()

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(self.torch_device)
        torch.cuda.empty_cache()
