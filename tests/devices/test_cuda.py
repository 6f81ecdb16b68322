"""The CUDA device against a fake ``torch.cuda``: the order of what is asked of it. tests/gpu has what a card shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from offload.devices import get_device
from offload.devices.cuda import CudaFence, CudaHostArena, CudaLink, CudaSlotArena
from offload.devices.cuda_passage import CudaPassage, measure
from offload.errors import BudgetError, DeviceError, UsageError
from tests.fake_cuda import CPU, FakeCuda

SLOT = 4096


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def link(cuda: FakeCuda) -> CudaLink:
    arena, host = CudaSlotArena(CPU, 4, SLOT, 4), CudaHostArena(6, SLOT)
    for buffer in range(6):
        host.writable(buffer)[:] = bytes([buffer + 1]) * SLOT
    return CudaLink(CPU, arena, host)


def test_a_copy_up_waits_for_the_slots_last_kernel_and_kernels_wait_for_it(cuda: FakeCuda, link: CudaLink) -> None:
    used = link.computed([2])
    assert isinstance(used, CudaFence)
    cuda.log.clear()
    fence = link.upload(3, 2, 100, [used])
    assert isinstance(fence, CudaFence)
    stream = cuda.log[0][0]
    assert stream != "kernels"
    assert cuda.log == [
        (stream, "enter"),
        (stream, "wait", used.event.name),
        (stream, "record", fence.event.name),
    ]
    assert link._arena.tensor(2)[:101].tolist()[98:100] == [4, 4]
    cuda.log.clear()
    link.join(fence)
    assert ("kernels", "wait", fence.event.name) in cuda.log
    assert all(name == "kernels" for name, *_ in cuda.log), "the CPU does not wait"


def test_a_copy_that_is_done_is_not_waited_for(cuda: FakeCuda, link: CudaLink) -> None:
    fence = link.upload(0, 0, SLOT, [])
    cuda.done = True
    cuda.log.clear()
    link.join(fence)
    assert cuda.log == []
    assert fence.done()


def test_stalls_are_measured_by_the_card(cuda: FakeCuda, link: CudaLink) -> None:
    for slot in range(3):
        link.join(link.upload(slot, slot, SLOT, []))
    assert link.stall_seconds() == 0, "not known yet"
    cuda.done = True
    assert link.stall_seconds() == pytest.approx(0.75)
    assert link.stall_seconds() == pytest.approx(0.75)


def test_up_and_down_have_a_stream_each(cuda: FakeCuda, link: CudaLink) -> None:
    up = link.upload(1, 1, SLOT, [])
    first = cuda.log[-1][0]
    link.download(1, 5, SLOT, [up])
    assert cuda.log[-1][0] not in (first, "kernels")
    assert bytes(link._host.writable(5)) == bytes([2]) * SLOT


def test_host_buffers_are_pinned_when_they_are_first_written(cuda: FakeCuda) -> None:
    size = 6 * 2**20
    host = CudaHostArena(10, size)  # two to a group
    assert [length for _, length in cuda.registered] == [2 * size], "the last group: staging buffers"
    host.writable(0)
    host.writable(1)
    assert len(cuda.registered) == 2
    host.release([0])
    assert len(cuda.registered) == 2, "its neighbour is in use"
    host.release([0, 1])
    assert len(cuda.registered) == 1
    host.close()
    assert cuda.registered == []


def test_without_the_right_to_pin_memory_copies_still_work(cuda: FakeCuda) -> None:
    cuda.refuse_pinning = True
    host = CudaHostArena(6, SLOT)
    assert not host.pinned
    host.writable(1)[:] = b"x" * SLOT
    assert host.tensor(1)[0] == ord("x")
    assert len(cuda.registered) == 1, "it is not tried again and again"


def test_fewer_slots_where_the_card_refuses_more(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    real, given = torch.empty, []

    def scarce(*args: Any, **options: Any) -> torch.Tensor:
        if len(given) == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        given.append(args)
        return real(*args, **options)

    monkeypatch.setattr(torch, "empty", scarce)
    arena = CudaSlotArena(CPU, 64, SLOT, 64)
    assert arena.segment_slots == 2
    assert arena.available == list(range(6))
    arena.release([2, 3])
    assert arena.available == [0, 1, 4, 5]
    assert cuda.log == [("host", "empty")], "freed segments go back to the card"
    with pytest.raises(ValueError, match="as a whole"):
        arena.release([4])
    with pytest.raises(BudgetError, match="--vram"):
        CudaSlotArena(CPU, 4, SLOT, 4)


@pytest.fixture
def passage(cuda: FakeCuda) -> Iterator[CudaPassage]:
    made = CudaPassage(CPU)
    yield made
    made.close()
    assert cuda.registered == []


def test_inputs_of_the_cpus_part_wait_for_the_kernels_that_made_them(cuda: FakeCuda, passage: CudaPassage) -> None:
    arrived = passage.down(torch.tensor([[1.0, 2.0]]))
    (made_by, _, made), *rest = cuda.log
    assert made_by == "kernels"
    stream = rest[0][0]
    assert rest == [(stream, "enter"), (stream, "wait", made), (stream, "record", rest[-1][2])]
    assert stream != "kernels" and ("host", "wait", rest[-1][2]) not in cuda.log, "loads and hits start meanwhile"
    assert arrived().tolist() == [[1.0, 2.0]]
    assert cuda.log[-1] == ("host", "wait", rest[-1][2])
    assert len(cuda.registered) == 1, "pinned"


def test_products_go_up_on_a_stream_of_their_own(cuda: FakeCuda, passage: CudaPassage) -> None:
    product = torch.tensor([[3.0]])
    moved = passage.up(product)
    product.zero_()
    assert moved.tolist() == [[3.0]]
    stream, copied = cuda.log[-3][0], cuda.log[-3][2]
    assert stream != "kernels"
    assert cuda.log == [
        (stream, "enter"),
        (stream, "record", copied),
        ("kernels", "wait", copied),
        ("kernels", "keeps", "memory"),
    ], "the CPU waits for nothing"
    passage.up(product)
    assert ("host", "wait", copied) not in cuda.log, "the other buffer is free"
    passage.up(product)
    assert ("host", "wait", copied) in cuda.log, "before the first one is written again"


def test_buffers_grow_and_are_used_again(cuda: FakeCuda, passage: CudaPassage) -> None:
    passage.down(torch.zeros(8))()
    first = list(cuda.registered)
    passage.down(torch.zeros(4))()
    assert cuda.registered == first
    assert passage.down(torch.ones(4096))().sum() == 4096
    assert [size for _, size in cuda.registered] == [4 * 4096]


def test_without_the_right_to_pin_inputs_and_products_still_move(cuda: FakeCuda, passage: CudaPassage) -> None:
    cuda.refuse_pinning = True
    assert passage.down(torch.ones(3))().tolist() == [1, 1, 1]
    assert passage.up(torch.ones(2)).tolist() == [1, 1]
    cuda.registered.clear()  # the fake writes down what it refused, too


def test_the_rates_of_a_card_are_measured(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(torch.cuda, "synchronize", synced.append)
    rates = measure(CPU, torch.zeros(2**20, dtype=torch.uint8), lambda: (5e9, 7e10))
    assert (rates.host_bytes_per_s, rates.host_flops_per_s) == (5e9, 7e10)
    assert rates.link_bytes_per_s > 0 < rates.device_bytes_per_s and rates.device_flops_per_s > 0 < rates.load_s
    assert len(synced) == 8, "before and after each of four"


def test_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"--device cuda: .* or use --device cpu"):
        get_device("cuda")
    with pytest.raises(UsageError, match="'cuda:x' is not a card"):
        get_device("cuda:x")
    assert get_device("auto").name == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match="there are 1 cards"):
        get_device("cuda:1")
