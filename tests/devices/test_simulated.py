"""The pretend GPU: what a real one would not allow raises, and what it would silently do wrong does too."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cache.machines import load_machine
from offload.devices.simulated import SimulatedDevice, SimulatedError, VramExhausted
from offload.devices.simulated.arena import SimHostArena, SimLink, SimSlotArena
from offload.devices.simulated.kernels import SimExperts
from offload.devices.simulated.tensor import Vram, to_device
from offload.errors import BudgetError

SLOT = 4096
MIB = 2**20


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    made = SimulatedDevice(load_machine("rtx4060"))
    yield made
    made.close()


class Tiers:
    """A few slots and host buffers; host buffer i holds the byte i + 1."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device
        arena, host = device.allocate_slots(4, SLOT), device.allocate_host(4, SLOT, 4)
        assert isinstance(arena, SimSlotArena) and isinstance(host, SimHostArena)
        self.arena, self.host = arena, host
        link = device.link(arena, host)
        assert isinstance(link, SimLink)
        self.link = link
        for buffer in range(4):
            host.writable(buffer)[:] = bytes([buffer + 1]) * SLOT

    def read(self, slot: int, tell: list[int] | None = None, gate: threading.Event | None = None) -> None:
        """A kernel that reads ``slot``."""

        class Reader:
            def begin(self, *args: Any) -> Any:
                return self

            experts = (0,)
            calls = 1

            def compute(self, ready: Any) -> None:
                if gate is not None:
                    assert gate.wait(30)
                if tell is not None:
                    tell.append(int(event._launched[0]["w"].elem[0]))

            def result(self) -> Any:
                return None

        kernels = SimExperts(Reader(), self.device.world, self.device._kernels, self.arena)  # type: ignore[arg-type]
        weights = {"w": self.arena.tensor(slot)}
        event: Any = kernels.begin(None, torch.zeros(1), torch.zeros(1), torch.zeros(1), lambda key: weights)  # type: ignore[arg-type, return-value]
        event.compute([0])


@pytest.fixture
def tiers(device: SimulatedDevice) -> Tiers:
    return Tiers(device)


def test_the_numbers_are_those_of_the_cpu(device: SimulatedDevice) -> None:
    values = torch.randn(33, 17)
    with torch.inference_mode(), device.running():
        ours = to_device(values, device.world)
        result = torch.nn.functional.silu(ours @ ours.t()).sum(-1)
        assert result.device.type == "simgpu"
        assert torch.equal(result.to("cpu"), torch.nn.functional.silu(values @ values.t()).sum(-1))
        assert ours[3, :2].tolist() == values[3, :2].tolist()
        assert torch.arange(3, device=device.torch_device).device == device.torch_device
        assert torch.tensor([1, 2], device=device.torch_device).device == device.torch_device


def test_tensors_of_two_devices_do_not_mix(device: SimulatedDevice) -> None:
    with torch.inference_mode(), device.running():
        ours = to_device(torch.ones(3), device.world)
        with pytest.raises(SimulatedError, match="expected all tensors on simgpu"):
            _ = ours + torch.ones(3)
        assert (ours + torch.tensor(2.0)).tolist() == [3, 3, 3], "a number without dimensions may come from the host"


def test_memory_beyond_the_budget_is_refused_and_freed_memory_counts_again(device: SimulatedDevice) -> None:
    device.set_budget(10 * MIB)
    with torch.inference_mode(), device.running():
        first = torch.zeros(6 * MIB, dtype=torch.uint8, device=device.torch_device)
        view = first[:5]
        with pytest.raises(VramExhausted):
            torch.zeros(6 * MIB, dtype=torch.uint8, device=device.torch_device)
        del first
        with pytest.raises(VramExhausted):
            torch.zeros(6 * MIB, dtype=torch.uint8, device=device.torch_device)
        del view
        again = torch.zeros(6 * MIB, dtype=torch.uint8, device=device.torch_device)
    memory = device.memory()
    context = device.reserved_bytes()
    assert memory is not None and memory.used - context == 6 * MIB == memory.peak - context
    assert memory.budget - context == 10 * MIB
    del again
    assert device.vram.used == 0


def test_a_smaller_budget_does_not_hit_what_was_launched_before(device: SimulatedDevice) -> None:
    class Kernel:
        experts, calls = (0,), 1

        def begin(self, *args: Any) -> Any:
            return self

        def compute(self, ready: Any) -> None:
            assert gate.wait(30)
            torch.ones(1000, device=device.torch_device)  # a card would have taken it at the launch

    gate = threading.Event()
    arena = device.allocate_slots(1, SLOT)
    assert isinstance(arena, SimSlotArena)
    kernels = SimExperts(Kernel(), device.world, device._kernels, arena)  # type: ignore[arg-type]
    kernels.begin(None, torch.empty(1), torch.empty(1), torch.empty(1), lambda key: {}).compute([])
    threading.Timer(0.05, gate.set).start()
    device.set_budget(device.vram.used)
    device._kernels.synchronize()
    assert device.vram.budget == device.vram.used == arena.segment_slots * SLOT


def test_slots_beyond_the_budget(device: SimulatedDevice) -> None:
    device.set_budget(100 * SLOT)
    arena = device.allocate_slots(200, SLOT)
    assert len(arena.available) == 100 // arena.segment_slots * arena.segment_slots, "as many as there is room for"
    arena.release(arena.available)
    assert device.vram.used == 0
    device.set_budget(1)
    with pytest.raises(BudgetError, match="--vram"):
        device.allocate_slots(4, SLOT)


def test_a_record_is_poison_until_its_copy_is_done(tiers: Tiers) -> None:
    tiers.link.hold.clear()
    fence = tiers.link.upload(2, 0, SLOT, [])
    assert not fence.done()
    assert set(tiers.arena.bytes(0).tolist()) == {0xFF}
    tiers.link.hold.set()
    fence.wait()
    assert set(tiers.arena.bytes(0).tolist()) == {3}


def test_a_kernel_that_does_not_wait_for_the_copy_is_found(tiers: Tiers) -> None:
    fence = tiers.link.upload(2, 0, SLOT, [])
    with pytest.raises(SimulatedError, match="slot 0 is read before"):
        tiers.read(0)
    tiers.link.join(fence)
    seen: list[int] = []
    tiers.read(0, seen)
    tiers.device._kernels.synchronize()
    assert seen == [3]


def test_a_slot_that_was_never_filled_is_not_read(tiers: Tiers) -> None:
    with pytest.raises(SimulatedError, match="slot 3 is read before"):
        tiers.read(3)


def test_a_copy_that_does_not_wait_for_the_last_kernel_is_found_whatever_the_timing(tiers: Tiers) -> None:
    tiers.link.join(tiers.link.upload(0, 1, SLOT, []))
    gate, seen = threading.Event(), list[int]()
    tiers.read(1, seen, gate)
    used = tiers.link.computed([1])
    with pytest.raises(SimulatedError, match="slot 1 is overwritten while it is in use"):
        tiers.link.upload(3, 1, SLOT, [])
    fence = tiers.link.upload(3, 1, SLOT, [used])
    assert not fence.done(), "the copy waits for the kernel"
    gate.set()
    fence.wait()
    assert seen == [1], "the kernel saw the record that it was launched for"
    assert int(tiers.arena.bytes(1)[0]) == 4


def test_even_a_kernel_that_is_long_done_must_be_known_to_be(tiers: Tiers) -> None:
    tiers.link.join(tiers.link.upload(0, 1, SLOT, []))
    tiers.read(1)
    used = tiers.link.computed([1])
    used.stream.pass_by(used.number)  # type: ignore[attr-defined]
    with pytest.raises(SimulatedError, match="overwritten"):
        tiers.link.upload(3, 1, SLOT, [])
    used.wait()
    tiers.link.upload(3, 1, SLOT, []).wait()


def test_a_host_buffer_is_not_written_while_it_is_copied(tiers: Tiers) -> None:
    tiers.link.hold.clear()
    fence = tiers.link.upload(2, 0, SLOT, [])
    with pytest.raises(SimulatedError, match="host buffer 2 is used again"):
        tiers.host.writable(2)
    tiers.link.hold.set()
    fence.wait()
    tiers.host.writable(2)


def test_a_record_goes_down_and_up_again_in_order(tiers: Tiers) -> None:
    up = tiers.link.upload(2, 0, SLOT, [])
    with pytest.raises(SimulatedError, match="slot 0 is copied before its record is there"):
        tiers.link.download(0, 3, SLOT, [])
    down = tiers.link.download(0, 3, SLOT, [up])
    with pytest.raises(SimulatedError, match="slot 0 is overwritten"):
        tiers.link.upload(1, 0, SLOT, [])
    with pytest.raises(SimulatedError, match="host buffer 3 has not arrived"):
        tiers.link.upload(3, 1, SLOT, [])
    tiers.link.upload(1, 0, SLOT, [down]).wait()
    down.wait()
    assert bytes(tiers.host.writable(3)) == bytes([3]) * SLOT
    assert int(tiers.arena.bytes(0)[0]) == 2


def test_the_host_cannot_write_to_slots(tiers: Tiers) -> None:
    with pytest.raises(SimulatedError, match="copy over the link"):
        tiers.arena.buffer(0)


def test_an_error_in_a_kernel_comes_out_of_the_next_wait(device: SimulatedDevice) -> None:
    def broken() -> None:
        raise VramExhausted("no room")

    device._kernels.launch(broken)
    with pytest.raises(VramExhausted):
        device._kernels.synchronize()
    device._kernels.launch(broken)
    device.recover()
    device._kernels.synchronize()


def test_the_cpu_may_not_read_a_record_on_its_way_down(tiers: Tiers) -> None:
    up = tiers.link.upload(0, 1, SLOT, [])
    up.wait()
    tiers.link.hold.clear()
    down = tiers.link.download(1, 2, SLOT, [up])
    with pytest.raises(SimulatedError, match="the CPU reads host buffer 2"):
        tiers.host.tensor(2)
    assert tiers.host.tensor(0)[0] == 1, "reading beside a copy up is allowed"
    tiers.link.hold.set()
    down.wait()
    assert tiers.host.tensor(2)[0] == 1


def test_inputs_go_down_and_products_up(device: SimulatedDevice) -> None:
    passage = device.passage()
    with torch.inference_mode(), device.running():
        hidden = to_device(torch.arange(4.0), device.world)
        before = device.now()
        taken = passage.down(hidden)()
        assert taken.device.type == "cpu" and taken.tolist() == [0, 1, 2, 3]
        moved = passage.up(taken + 1)
        assert moved.device.type == "simgpu" and moved.to("cpu").tolist() == [1, 2, 3, 4]
    assert device.now() - before > 2 * device.machine.load_s
    assert device.miss_rates(None, lambda: (1.0, 1.0)).host_bytes_per_s == device.machine.host_bytes_per_s  # type: ignore[arg-type]


def test_memory_can_be_dropped_in_the_middle_of_anything() -> None:
    """The garbage collector runs where somebody allocates: maybe while the same thread counts memory."""
    vram = Vram(100)
    vram.hold(1, 60)

    def drop_inside() -> None:
        with vram._lock:
            vram.drop(1, 60)

    thread = threading.Thread(target=drop_inside, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for itself"
    vram.hold(1, 100)  # the same address again, and room for it
    assert (vram.used, vram.peak) == (100, 100)
    vram.drop(1, 100)
    assert vram.used == 0
