"""The virtual clock: lanes beside each other, demand before prefetch, and the same time every time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cache.machines import load_machine
from offload.devices.clock import VirtualClock

MACHINE = replace(
    load_machine("rtx4060"),
    disk_bytes_per_s=1.0, link_bytes_per_s=10.0, expert_bytes_per_s=100.0, flops_per_s=1000.0, launch_s=0.5, load_s=0.0,
    host_bytes_per_s=20.0, host_flops_per_s=100.0,
)  # fmt: skip


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(MACHINE)


def test_kernels_run_beside_the_cpu(clock: VirtualClock) -> None:
    assert clock.launch(1000) == 0.5 + 10
    assert clock.now == 0.5
    assert clock.launch(100, flops=5000) == 10.5 + 5, "the slower of memory and arithmetic, behind the one before"
    assert clock.now == 1.0
    clock.sync()
    assert clock.now == 15.5


def test_a_record_goes_through_disk_and_link(clock: VirtualClock) -> None:
    first, second = (clock.load(10, 10, False, 0.0) for _ in range(2))
    assert not first.done()
    assert first.wait() == (10.0, 1.0)
    assert clock.now == 11.0
    assert second.wait() == (9.0, 1.0), "its read went on while the first was copied"
    assert (clock.stall_disk, clock.stall_link) == (19.0, 2.0)


def test_what_arrived_while_others_worked_costs_nothing(clock: VirtualClock) -> None:
    timing = clock.load(0, 10, False, 0.0)
    clock.host(5)
    assert timing.done()
    assert timing.wait() == (0.0, 0.0)
    assert clock.now == 5


def test_a_copy_waits_for_the_slots_last_kernel(clock: VirtualClock) -> None:
    used = clock.launch(1000)
    timing = clock.load(0, 10, False, used)
    timing.wait()
    assert clock.now == 11.5


def test_demand_overtakes_prefetches_that_have_not_begun(clock: VirtualClock) -> None:
    running, waiting = (clock.load(10, 10, True, 0.0) for _ in range(2))
    clock.host(1)
    demand = clock.load(10, 10, False, 0.0)
    demand.wait()
    assert clock.now == 21.0, "it waits for the one that runs, not for the other"
    assert running.done() and not waiting.done()
    waiting.wait()
    assert clock.now == 31.0


def test_a_promoted_prefetch_is_a_demand(clock: VirtualClock) -> None:
    clock.load(10, 10, True, 0.0)
    first, second = (clock.load(10, 10, True, 0.0) for _ in range(2))
    clock.host(1)
    second.promote()
    second.wait()
    assert clock.now == 21.0 and not first.done()


def test_only_what_has_not_begun_is_dropped(clock: VirtualClock) -> None:
    running, waiting = (clock.load(10, 10, True, 0.0) for _ in range(2))
    clock.host(1)
    assert not running.drop()
    assert waiting.drop()
    clock.host(100)
    assert running.done()
    last = clock.load(10, 10, False, 0.0)
    last.wait()
    assert clock.now == 112.0, "the dropped one took no time"


def test_the_cpu_shares_its_memory_with_copies(clock: VirtualClock) -> None:
    clock.host_expert(40, 10)
    assert clock.now == 2.0
    clock.host_expert(40, 500)
    assert clock.now == 7.0, "arithmetic takes longer than reading"
    load = clock.load(0, 30, False, 0.0)
    clock.host_expert(20, 0)
    assert clock.now == 7.0 + 1.0 + 0.5, "a second of reading, in which the copy takes half of the rate"
    assert load.wait()[1] == pytest.approx(1.5), "the copy went on meanwhile"
    clock.host_expert(20, 0)
    assert clock.now == 11.0
