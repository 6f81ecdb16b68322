"""Disk -> host memory -> device: loads through the host tier, over a link that runs beside the CPU.

The states of both tiers change in program order on the engine thread; when memory may really be used again is left to
fences. A demand for a record in host memory starts its copy at once. A record on disk is read by the disk lane's
workers, who start its copy when it has arrived. Prefetches of records in host memory have a lane of their own, one copy
at a time, so that a demand waits for one of them at most.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence

import torch

from cache.host_tier import HostCounters, HostTier
from cache.keys import ExpertKey
from cache.misses import MissRates
from offload.checkpoint.expert_file import ExpertFile
from offload.devices.base import Device, Fence, HostArena, Link, SlotArena
from offload.devices.clock import LoadTiming
from offload.memory.lanes import DiskLane, Ticket
from offload.memory.loads import LinkCounters, Loads, LoadTicket


class _Staging:
    """Host buffers for records that do not stay: handed out one by one, and again once their copy is done."""

    def __init__(self, buffers: Sequence[int]) -> None:
        self._free: queue.Queue[tuple[int, Fence | None]] = queue.Queue()
        for buffer in buffers:
            self._free.put((buffer, None))

    def take(self) -> int:
        """Waits for a free one: that is what holds reads back when the link is slower than the disk."""
        buffer, fence = self._free.get()
        if fence is not None:
            fence.wait()
        return buffer

    def give(self, buffer: int, fence: Fence | None) -> None:
        self._free.put((buffer, fence))

    def __len__(self) -> int:
        return self._free.qsize()


class _Job:
    """One load as the lanes' workers see it."""

    def __init__(self, slot: int, size: int, source: int | None, before: Fence | None, after: list[Fence]) -> None:
        self.slot = slot
        self.size = size
        self.source = source  # the host buffer; None: a staging buffer, taken when the read starts
        self.before = before  # the host buffer's last copy
        self.after = after  # what the copy waits for
        self.fence: Fence | None = None
        self.patient = False  # wait for the copy before the next load


class _FromDisk:
    """The disk lane's work: read, then start the copy."""

    def __init__(self, file: ExpertFile, host: HostArena, link: Link, staging: _Staging) -> None:
        self._file = file
        self._host = host
        self._link = link
        self._staging = staging

    def read_into(self, key: ExpertKey, job: _Job) -> int:
        staged = job.source is None
        source = self._staging.take() if job.source is None else job.source
        try:
            if job.before is not None:
                job.before.wait()
            size = self._file.read_into(key, self._host.writable(source))
            job.fence = self._link.upload(source, job.slot, job.size, job.after)
            if job.patient:
                job.fence.wait()
            return size
        finally:
            if staged:
                self._staging.give(source, job.fence)


class _FromHost:
    """The link lane's work: a prefetch of a record in host memory."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def read_into(self, key: ExpertKey, job: _Job) -> int:
        assert job.source is not None
        job.fence = self._link.upload(job.source, job.slot, job.size, job.after)
        job.fence.wait()
        return 0


class TieredTicket:
    """A load through the tiers. Its end is told to the host tier once, by the engine thread."""

    def __init__(
        self, loads: TieredLoads, key: ExpertKey, job: _Job, lane: Ticket | None, timing: LoadTiming | None, kept: bool
    ) -> None:
        self.key = key
        self.size = 0
        self._loads = loads
        self._job = job
        self._lane = lane
        self._timing = timing
        self._kept = kept  # the host tier has a buffer for it
        self._landed = self._dropped = False

    def ready(self) -> bool:
        """On a virtual clock that alone decides, so that a run is the same every time."""
        if self._timing is not None:
            return self._dropped or self._timing.done()
        if self._lane is not None and not self._lane.ready():
            return False
        return self._job.fence is None or self._job.fence.done()

    def wait(self) -> tuple[int, float]:
        """Kernels launched after this find the record in its slot."""
        stalled = 0.0
        if self._lane is not None:
            try:
                self.size, stalled = self._lane.wait()
            except BaseException:
                self._land(False)
                raise
        if self._timing is not None:
            stalled, _ = self._timing.wait()
        self._land(True)
        return self.size, stalled

    def promote(self) -> None:
        if self._timing is not None:
            self._timing.promote()
        self._job.patient = False
        if self._lane is not None:
            self._lane.promote()

    def drop(self) -> bool:
        if self._dropped or self._landed:
            return self._dropped
        if self._timing is not None:
            self._dropped = self._timing.drop()
            if self._dropped and self._lane is not None:
                self._lane.settle()  # it may have run by now; on the named machine it has not
                if self._job.fence is not None:  # nor must its copy be what later ones wait for
                    self._job.fence.wait()
                    self._job.fence = None
        elif self._lane is not None:
            self._dropped = self._lane.drop()
        return self._dropped

    def settle(self) -> bool:
        if not self._landed:
            self.drop()
            arrived = (self._lane is None or self._lane.settle()) and not self._dropped
            self._dropped = not arrived
            if arrived:
                self.size = self._lane.size if self._lane is not None else 0
                if self._timing is not None:
                    self._timing.wait()
            self._land(arrived)
        return not self._dropped

    def _land(self, arrived: bool) -> None:
        if not self._landed:
            self._landed = True
            self._loads._land(self.key, self._job, self._kept, arrived)


class TieredLoads(Loads):
    """Loads of a device with memory of its own.

    ``exclusive``: a record is in one of the tiers, not both; victims of the device fall back into host memory unless
    they are colder than everything there.
    """

    keeps_order = True

    def __init__(
        self,
        device: Device,
        file: ExpertFile,
        arena: SlotArena,
        host_arena: HostArena,
        tier: HostTier,
        workers: int,
        staging: int,
        exclusive: bool = False,
    ) -> None:
        """The last ``staging`` buffers of ``host_arena`` are for records that do not stay."""
        most = host_arena.slots - staging
        self.tier = tier
        self.host: HostCounters = tier.counters
        self.link: LinkCounters = LinkCounters()
        self._records = sum(layer.experts for layer in file.manifest.layers)
        self.exclusive = exclusive
        self.staging = _Staging(range(most, host_arena.slots))
        self._spare = list(range(tier.slots, most))
        self._device = device
        self._file = file
        self._link = device.link(arena, host_arena)
        self._disk = DiskLane(_FromDisk(file, host_arena, self._link, self.staging), workers)
        self._ahead = DiskLane(_FromHost(self._link), 1, "link")
        self._last_use: dict[int, list[Fence]] = {}  # slot -> what the next copy into it waits for
        self._last_fill: dict[int, Fence] = {}  # slot -> the copy that filled it
        self._last_copy: dict[int, Fence] = {}  # host buffer -> the last copy from or to it
        self._host_arena = host_arena

    def load(self, key: ExpertKey, slot: int, *, victim: ExpertKey | None = None, prefetch: bool = False) -> LoadTicket:
        after = self._last_use.pop(slot, [])
        if victim is not None and self.exclusive:
            self._demote(victim, slot, after)
        size = self._file.layout(key.layer).record_bytes
        source = self.tier.find(key)
        if source is not None:
            return self._from_host(key, slot, size, source, after, prefetch)
        self.host.misses += 1
        reserved = None if self.exclusive else self.tier.reserve(key)
        before = None if reserved is None else self._last_copy.get(reserved.slot)
        job = _Job(slot, size, None if reserved is None else reserved.slot, before, after)
        job.patient = prefetch
        timing = self._device.plan_load(size, size, prefetch, after)
        try:
            lane = self._disk.load(key, job, prefetch=prefetch)
        except BaseException:
            self._last_use[slot] = after
            if reserved is not None:
                self.tier.abandon(key)
            raise
        return TieredTicket(self, key, job, lane, timing, reserved is not None)

    def lies_in_ram(self, key: ExpertKey) -> bool:
        return self.tier.find(key) is not None

    def lend(self, key: ExpertKey) -> torch.Tensor:
        source = self.tier.find(key)
        assert source is not None, "only what lies in RAM is lent"
        arrival = self._last_copy.get(source)
        if arrival is not None and not arrival.done():
            arrival.wait()  # it may be on its way down from the device
        self.tier.pin(key)
        self.host.hits += 1
        return self._host_arena.tensor(source)

    def miss_rates(self, of_cpu: Callable[[], tuple[float, float]]) -> MissRates:
        """See :meth:`offload.devices.base.Device.miss_rates`."""
        return self._device.miss_rates(self._host_arena, of_cpu)

    def give_back(self, key: ExpertKey) -> None:
        self.tier.unpin(key)

    def event(self, keys: Sequence[ExpertKey], lacking: Sequence[ExpertKey]) -> None:
        if self.tier.slots < self._records:  # else nothing ever goes
            # a copy of what the device has is of no use here; what falls from it brings its history along
            self.tier.record_event(keys if self.exclusive else lacking)

    def computed(self, slots: Sequence[int]) -> None:
        fence = self._link.computed(slots)
        for slot in slots:
            self._last_use[slot] = [fence]

    def quiesce(self, slots: Sequence[int]) -> None:
        for slot in slots:
            filled = self._last_fill.pop(slot, None)
            for fence in (*self._last_use.pop(slot, []), *([filled] if filled is not None else [])):
                fence.wait()
        for fence in self._last_copy.values():  # one of them may be of a record on its way down from such a slot
            fence.wait()

    def fill_host(self, keys: Sequence[ExpertKey], on_key: Callable[[int], None] | None = None) -> int:
        """Read records into free buffers of the host tier, for as many ``keys`` as there are; returns how many."""
        done = 0
        for key in keys:
            if self.tier.used == self.tier.slots:
                break
            reserved = self.tier.reserve(key)
            if reserved is None:
                break
            try:
                self._file.read_into(key, self._host_arena.writable(reserved.slot))
            except BaseException:
                self.tier.abandon(key)
                raise
            self.tier.commit(key)
            done += 1
            if on_key is not None:
                on_key(done)
        return done

    def resize_host(self, slots: int) -> int:
        """Have ``slots`` buffers in the host tier, as far as there is address space; returns how many there are."""
        if slots < self.tier.slots:
            gone = self.tier.shrink(slots)
            for buffer in gone:
                if (fence := self._last_copy.pop(buffer, None)) is not None:
                    fence.wait()
            self._host_arena.release(gone)
            self._spare += gone
        elif slots > self.tier.slots:
            more = slots - self.tier.slots
            self.tier.grow(self._spare[:more])
            del self._spare[:more]
        return self.tier.slots

    def stall_link_seconds(self) -> float | None:
        return self._link.stall_seconds()

    def busy_seconds(self) -> float:
        return self._disk.busy_seconds()

    def close(self) -> None:
        self._disk.close()
        self._ahead.close()

    def _from_host(
        self, key: ExpertKey, slot: int, size: int, source: int, after: list[Fence], prefetch: bool
    ) -> LoadTicket:
        self.host.hits += 1
        if (arrival := self._last_copy.get(source)) is not None:
            after = [*after, arrival]  # it may be on its way down from the device
        job = _Job(slot, size, source, None, after)
        timing = self._device.plan_load(0, size, prefetch, after)
        lane = None
        if prefetch:
            lane = self._ahead.load(key, job, prefetch=True)
        else:
            job.fence = self._link.upload(source, slot, size, after)
        self.tier.pin(key)
        return TieredTicket(self, key, job, lane, timing, False)

    def _demote(self, victim: ExpertKey, slot: int, after: list[Fence]) -> None:
        """Copy the victim down before its slot is overwritten; adds the copy's fence to ``after``."""
        reserved = self.tier.demote(victim)
        if reserved is None:
            return
        size = self._file.layout(victim.layer).record_bytes
        earlier = [self._last_fill.get(slot), self._last_copy.get(reserved.slot)]
        fence = self._link.download(slot, reserved.slot, size, [*after, *(fence for fence in earlier if fence)])
        self._last_copy[reserved.slot] = fence
        after.append(fence)
        self.link.device_to_host += size

    def _land(self, key: ExpertKey, job: _Job, kept: bool, arrived: bool) -> None:
        """A load is over: bookkeeping of the host tier, and the order of what follows."""
        if arrived:
            self.link.host_to_device += job.size
        if job.fence is not None:
            self._link.join(job.fence)
            self._last_fill[job.slot] = job.fence
            if job.source is not None:
                self._last_copy[job.source] = job.fence
        if not arrived:  # who comes next waits for what it had to wait for, however far it came
            self._last_use[job.slot] = [*job.after, *([job.fence] if job.fence is not None else [])]
        if kept:
            if arrived:
                self.tier.commit(key)
            else:
                self.tier.abandon(key)
        elif job.source is not None:
            self.tier.unpin(key)
            if self.exclusive and arrived:
                self.tier.drop(key)
