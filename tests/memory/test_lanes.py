"""The disk lane: tickets tell of the load and carry its error, and nothing writes to a slot once they are settled."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest

from cache.keys import ExpertKey
from offload.checkpoint.expert_file import ExpertFile
from offload.errors import ExpertFileError
from offload.memory.lanes import DiskLane

RECORD = 4096


class FakeFile:
    """Reads wait until the gate of their key is opened; expert 13 is unreadable."""

    def __init__(self) -> None:
        self.gates: dict[ExpertKey, threading.Event] = {}
        self.started: list[ExpertKey] = []
        self.running = threading.Semaphore(0)

    def gate(self, key: ExpertKey) -> threading.Event:
        return self.gates.setdefault(key, threading.Event())

    def read_into(self, key: ExpertKey, buffer: memoryview) -> int:
        self.started.append(key)
        self.running.release()
        assert self.gate(key).wait(30)
        if key.expert == 13:
            raise ExpertFileError(f"layer {key.layer}, expert 13 cannot be read")
        buffer[:] = bytes([key.expert]) * RECORD
        return RECORD


def lane_of(file: FakeFile, workers: int = 1) -> DiskLane:
    return DiskLane(cast(ExpertFile, file), workers)


def slot() -> memoryview:
    return memoryview(bytearray(RECORD))


def test_ticket_of_a_load() -> None:
    file = FakeFile()
    lane, buffer, key = lane_of(file), slot(), ExpertKey(1, 7)
    ticket = lane.load(key, buffer)
    assert ticket.key == key
    assert not ticket.ready()
    file.gate(key).set()
    size, waited = ticket.wait()
    assert size == RECORD
    assert waited >= 0
    assert ticket.ready()
    assert bytes(buffer) == b"\7" * RECORD
    assert ticket.wait()[0] == RECORD, "waiting again is no error"
    assert ticket.settle()
    lane.close()


def test_ticket_carries_the_error() -> None:
    file = FakeFile()
    lane, key = lane_of(file), ExpertKey(2, 13)
    file.gate(key).set()
    ticket = lane.load(key, slot())
    for _ in range(2):
        with pytest.raises(ExpertFileError, match="layer 2, expert 13 cannot be read"):
            ticket.wait()
    assert ticket.ready()
    assert not ticket.settle()
    good = ExpertKey(2, 1)
    file.gate(good).set()
    assert lane.load(good, slot()).wait()[0] == RECORD, "the worker outlives an error"
    lane.close()


def test_settle_drops_a_load_that_has_not_started() -> None:
    file = FakeFile()
    lane, buffer = lane_of(file), slot()
    first, second = ExpertKey(0, 1), ExpertKey(0, 2)
    running = lane.load(first, slot())
    file.running.acquire()
    waiting = lane.load(second, buffer)
    assert not waiting.settle(), "the record did not arrive"
    assert waiting.ready()
    file.gate(first).set()
    file.gate(second).set()
    assert running.settle(), "a running one is waited for, and its record is whole"
    lane.close()
    assert file.started == [first]
    assert bytes(buffer) == bytes(RECORD)
    assert not waiting.settle(), "settling again is no error"


def test_settle_waits_for_a_running_load() -> None:
    file = FakeFile()
    lane, key, buffer = lane_of(file), ExpertKey(0, 5), slot()
    ticket = lane.load(key, buffer)
    file.running.acquire()
    with ThreadPoolExecutor(1) as pool:
        settled = pool.submit(ticket.settle)
        assert not settled.done()
        file.gate(key).set()
        assert settled.result(30)
    assert bytes(buffer) == b"\5" * RECORD
    lane.close()


def test_close_drops_queued_loads_and_waits_for_running_ones() -> None:
    file = FakeFile()
    lane = lane_of(file, workers=2)
    keys = [ExpertKey(0, expert) for expert in range(1, 7)]
    buffers = [slot() for _ in keys]
    tickets = [lane.load(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]
    for _ in range(2):
        file.running.acquire()
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(lane.close)
        for _ in range(1000):
            if tickets[-1].ready():
                break
            time.sleep(0.01)
        dropped = [ticket.ready() for ticket in tickets]
        assert not closing.done()
        for key in keys:
            file.gate(key).set()
        closing.result(30)
    assert dropped == [False, False, True, True, True, True]
    assert [ticket.settle() for ticket in tickets] == [True, True, False, False, False, False]
    assert sorted(file.started) == keys[:2]
    assert [bool(any(buffer)) for buffer in buffers] == [True, True, False, False, False, False]


def test_workers_read_at_the_same_time() -> None:
    file = FakeFile()
    lane = lane_of(file, workers=3)
    keys = [ExpertKey(0, expert) for expert in range(5)]
    tickets = [lane.load(key, slot()) for key in keys]
    for _ in range(3):
        assert file.running.acquire(timeout=30)
    assert len(file.started) == 3
    for key in keys:
        file.gate(key).set()
    assert [ticket.wait()[0] for ticket in tickets] == [RECORD] * 5
    lane.close()


def test_demand_goes_before_prefetches() -> None:
    file = FakeFile()
    lane = lane_of(file)
    first, ahead, wanted = ExpertKey(0, 1), ExpertKey(1, 2), ExpertKey(0, 3)
    for key in (first, ahead, wanted):
        file.gate(key).set()
    file.gates[first] = threading.Event()
    lane.load(first, slot())
    file.running.acquire()
    prefetch = lane.load(ahead, slot(), prefetch=True)
    demand = lane.load(wanted, slot())
    file.gate(first).set()
    demand.wait()
    prefetch.wait()
    assert file.started == [first, wanted, ahead]
    lane.close()


def test_a_demand_finds_a_free_worker_among_prefetches() -> None:
    file = FakeFile()
    lane = lane_of(file, workers=4)
    ahead = [ExpertKey(1, expert) for expert in range(4)]
    for key in ahead:
        lane.load(key, slot(), prefetch=True)
    for _ in range(2):
        file.running.acquire()
    wanted = ExpertKey(0, 9)
    file.gate(wanted).set()
    assert lane.load(wanted, slot()).wait()[0] == RECORD
    assert set(file.started) == {*ahead[:2], wanted}, "half of the workers at most prefetch"
    for key in ahead:
        file.gate(key).set()
    lane.close()


def test_prefetches_wait_while_a_demand_is_read() -> None:
    file = FakeFile()
    lane = lane_of(file, workers=4)
    wanted, ahead = ExpertKey(0, 9), [ExpertKey(1, expert) for expert in range(4)]
    demand = lane.load(wanted, slot())
    file.running.acquire()
    tickets = [lane.load(key, slot(), prefetch=True) for key in ahead]
    assert not file.running.acquire(timeout=0.05), "three workers are idle, but not the disk"
    file.gate(wanted).set()
    demand.wait()
    for _ in range(2):
        assert file.running.acquire(timeout=30), "two at a time as soon as it is"
    for key in ahead:
        file.gate(key).set()
    assert all(ticket.settle() for ticket in tickets[:2])
    lane.close()


def test_a_promoted_prefetch_overtakes_the_others() -> None:
    file = FakeFile()
    lane = lane_of(file)
    blocker, *ahead = (ExpertKey(0, expert) for expert in range(1, 4))
    lane.load(blocker, slot())
    file.running.acquire()
    tickets = [lane.load(key, slot(), prefetch=True) for key in ahead]
    tickets[1].promote()
    for key in (blocker, *ahead):
        file.gate(key).set()
    assert [ticket.wait()[0] for ticket in tickets] == [RECORD] * 2
    assert file.started == [blocker, ahead[1], ahead[0]]
    lane.close()


def test_only_what_has_not_started_can_be_dropped() -> None:
    file = FakeFile()
    lane = lane_of(file)
    running = lane.load(ExpertKey(0, 1), slot(), prefetch=True)
    file.running.acquire()
    waiting = lane.load(ExpertKey(0, 2), slot(), prefetch=True)
    assert waiting.drop() and waiting.ready() and not waiting.settle()
    assert waiting.drop(), "dropping again is no error"
    assert not running.drop()
    file.gate(ExpertKey(0, 1)).set()
    assert running.settle()
    assert lane.busy_seconds() > 0
    lane.close()
    with pytest.raises(RuntimeError, match="closed"):
        lane.load(ExpertKey(0, 3), slot())
