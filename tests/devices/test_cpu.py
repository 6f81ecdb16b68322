"""The slot arena of the CPU: aligned slots apart from each other, backed by memory of this process alone."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.devices import get_device
from offload.devices.cpu import CpuDevice
from offload.errors import BudgetError, UsageError
from offload.memory.process import process_memory

MIB = 2**20


def address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@given(st.integers(1, 40), st.integers(1, 6).map(lambda blocks: blocks * 4096))
def test_slots_are_aligned_and_disjoint(slots: int, slot_bytes: int) -> None:
    arena = CpuDevice().allocate_slots(slots, slot_bytes)
    assert (arena.slots, arena.slot_bytes) == (slots, slot_bytes)
    taken: list[tuple[int, int]] = []
    for slot in range(slots):
        buffer, tensor = arena.buffer(slot), arena.tensor(slot)
        assert (len(buffer), buffer.readonly, buffer.format) == (slot_bytes, False, "B")
        assert (tensor.shape, tensor.dtype, tensor.device.type) == ((slot_bytes,), torch.uint8, "cpu")
        assert address(buffer) == tensor.data_ptr(), "a read goes straight into the tensor"
        assert tensor.data_ptr() % 4096 == 0
        taken.append((tensor.data_ptr(), tensor.data_ptr() + slot_bytes))
    taken.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))


def test_a_slot_holds_what_was_read_into_it() -> None:
    arena = CpuDevice().allocate_slots(5, 8192)
    for slot in range(5):
        arena.buffer(slot)[:] = bytes([slot + 1]) * 8192
    for slot in range(5):
        assert (arena.tensor(slot) == slot + 1).all()
    arena.tensor(3).zero_()
    assert not any(arena.buffer(3))
    assert (arena.tensor(2) == 3).all()
    assert (arena.tensor(4) == 5).all()


def test_touch_backs_every_page_and_reports() -> None:
    slots, slot_bytes = 150, MIB
    before = process_memory()
    arena = CpuDevice().allocate_slots(slots, slot_bytes)
    assert process_memory().total - before.total < 16 * MIB, "nothing is backed yet"
    events: list[tuple[int, int]] = []
    arena.touch(lambda done, total: events.append((done, total)))
    assert [done for done, _ in events] == [64 * MIB, 128 * MIB, 150 * MIB]
    assert {total for _, total in events} == {slots * slot_bytes}
    grown = process_memory().anonymous - before.anonymous
    assert 140 * MIB < grown < 170 * MIB
    arena.close()
    assert process_memory().anonymous - before.anonymous < 32 * MIB, "close gives it back"


def test_slots_are_private_memory() -> None:
    """Shared memory would be counted as a file by the cgroup, and huge pages are not made of it."""

    def shared() -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["RssShmem"].split()[0]) * 1024

    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell the kinds of memory apart")
    before = shared()
    arena = CpuDevice().allocate_slots(32, MIB)
    arena.touch(lambda done, total: None)
    assert shared() - before < MIB
    arena.close()


# In a process of its own, since what may go wrong ends it.
LIVE_VIEW = """
import torch
from offload.devices.cpu import CpuDevice

arena = CpuDevice().allocate_slots(8, 2**20)
arena.touch(lambda done, total: None)
arena.buffer(3)[:] = b"x" * 2**20
"""
LIVE_TENSOR = """
view = arena.tensor(3).view(torch.float32).view(512, 512)[7:9]
arena.close()
assert view.view(torch.uint8).unique().tolist() == [ord("x")]
"""
LIVE_BUFFER = """
buffer = arena.buffer(3)
arena.close()
buffer[:3] = b"abc"
assert bytes(buffer[:5]) == b"abcxx"
"""


@pytest.mark.parametrize("use", [LIVE_TENSOR, LIVE_BUFFER], ids=["tensor", "buffer"])
def test_close_with_live_views(use: str) -> None:
    """The contract forbids using them; still the process must not crash, as when an error's traceback holds one."""
    root = Path(__file__).resolve().parents[2]
    answer = subprocess.run([sys.executable, "-c", LIVE_VIEW + use], cwd=root, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def test_memory_that_the_system_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BudgetError, match=r"the system refuses .* for expert slots .* smaller --ram"):
        CpuDevice().allocate_slots(2**40, 2**30)

    def refuse(*arguments: Any, **named: Any) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(BudgetError, match=r"refuses 40.0 MiB for expert slots .*Cannot allocate memory"):
        CpuDevice().allocate_slots(40, MIB)


def test_names() -> None:
    assert get_device("auto").name == get_device("cpu").name == "cpu"
    assert get_device("cpu").torch_device == torch.device("cpu")
    with pytest.raises(UsageError, match="--device: 'tpu' is not one of auto, cpu, cuda, simulated"):
        get_device("tpu")
