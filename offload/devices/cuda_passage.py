"""Between a CUDA card and the CPU's part of an event: pinned buffers, a stream of their own, the link's rates."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from cache.misses import MissRates
from offload.devices.base import Passage
from offload.devices.host_memory import HostMemory

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context
_PAGE = 4096
_COPIES = 8
_PROBE_BYTES = 32 * 2**20
_TOKENS, _ROWS, _COLUMNS = 512, 1536, 2048  # a product about the size of an expert's


class _Buffer:
    """Pinned host memory, made larger as it is asked for, and the event behind its last copy."""

    def __init__(self) -> None:
        self.event: Any = None
        self._memory: HostMemory | None = None
        self._size = 0
        self._address = 0

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """A tensor of that shape and dtype in it, once what was copied from or to it before is done."""
        if self.event is not None:
            self.event.synchronize()
            self.event = None
        if like.nbytes > self._size:
            self.close()
            self._size = -(-like.nbytes // _PAGE) * _PAGE
            self._memory = HostMemory(1, self._size, "the CPU's part of an event", used=1)
            self._address = torch.from_numpy(self._memory.array()).data_ptr()
            if int(torch.cuda.cudart().cudaHostRegister(self._address, self._size, _PORTABLE)) != 0:
                self._address = 0  # pageable: copies are slower, and the CPU waits for them
        assert self._memory is not None
        part = torch.from_numpy(self._memory.array())[: like.nbytes]
        return part.view(like.dtype).view(like.shape)

    def close(self) -> None:
        """Every copy must be done."""
        if self._address:
            torch.cuda.cudart().cudaHostUnregister(self._address)
            self._address = 0
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        self._size = 0


class CudaPassage(Passage):
    """Copies wait for the kernels launched before them, and kernels launched later for copies; the CPU waits for inputs
    alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._inputs = _Buffer()
        self._outputs = [_Buffer(), _Buffer()]  # one is filled while the other is copied

    def down(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        target = self._inputs.take(tensor)
        made = torch.cuda.Event()
        made.record(torch.cuda.current_stream(self._device))
        event = self._inputs.event = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(made)
            target.copy_(tensor, non_blocking=True)
            event.record(self._stream)

        def arrived() -> torch.Tensor:
            event.synchronize()
            return target

        return arrived

    def up(self, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._outputs[0]
        self._outputs.reverse()
        staged = buffer.take(tensor)
        staged.copy_(tensor)
        kernels = torch.cuda.current_stream(self._device)
        event = buffer.event = torch.cuda.Event()
        with torch.cuda.stream(self._stream):  # the copy's memory is this stream's, so it waits for no kernel
            moved = torch.empty_like(staged, device=self._device)
            moved.copy_(staged, non_blocking=True)
            event.record(self._stream)
        kernels.wait_event(event)
        moved.record_stream(kernels)  # and must not be given to others of this stream before those kernels are done
        return moved

    def close(self) -> None:
        for buffer in (self._inputs, *self._outputs):
            if buffer.event is not None:
                buffer.event.synchronize()
            buffer.close()


def measure(device: torch.device, source: torch.Tensor, of_cpu: Callable[[], tuple[float, float]]) -> MissRates:
    """Time copies from ``source``, a host buffer with any content, and a read and a product on the card."""
    target = torch.empty_like(source, device=device)
    small = torch.empty(_PAGE, dtype=torch.uint8, device=device)
    load_s = _seconds(device, lambda: small.copy_(source[:_PAGE], non_blocking=True))
    link_s = max(_seconds(device, lambda: target.copy_(source, non_blocking=True)) - load_s, 1e-9)
    probe = torch.zeros(_PROBE_BYTES // 4, dtype=torch.int32, device=device)
    read_s = _seconds(device, lambda: probe.amax())
    inputs, weights = (torch.zeros(rows, _COLUMNS, dtype=torch.bfloat16, device=device) for rows in (_TOKENS, _ROWS))
    product_s = _seconds(device, lambda: torch.nn.functional.linear(inputs, weights))
    host_bytes, host_flops = of_cpu()
    return MissRates(
        link_bytes_per_s=source.nbytes / link_s,
        device_bytes_per_s=probe.nbytes / read_s,
        device_flops_per_s=2 * _TOKENS * _ROWS * _COLUMNS / product_s,
        host_bytes_per_s=host_bytes,
        host_flops_per_s=host_flops,
        load_s=load_s,
        event_s=2 * load_s,
    )


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Of one of several, launched one behind the other, by the CPU's clock."""
    work()
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(_COPIES):
        work()
    torch.cuda.synchronize(device)
    return max((time.perf_counter() - started) / _COPIES, 1e-9)
