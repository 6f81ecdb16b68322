"""Random events, prefetches, sizes, failures and cancels over the tiers: right sums, no deadlock, nothing leaked."""

from __future__ import annotations

import gc
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache.expert_cache import ExpertCache
from cache.host_tier import HostTier
from cache.keys import ExpertKey
from cache.machines import load_machine
from cache.misses import ExpertWork, MissPlanner, MissRates
from cache.policies import make_policy
from offload.checkpoint.expert_file import ExpertFile
from offload.checkpoint.formats import get_format
from offload.checkpoint.manifest import EXPERT_FILE_NAME, LayerLayout, Manifest
from offload.compute.base import EventCompute, ExpertCompute
from offload.compute.native_experts import NativeExperts
from offload.devices.cpu import CpuDevice
from offload.devices.simulated import SimulatedDevice, VramExhausted
from offload.devices.simulated.streams import SimFence, SimStream
from offload.devices.simulated.tensor import Vram, to_device
from offload.errors import Cancelled, ExpertFileError
from offload.memory.lanes import DiskLane, Ticket
from offload.memory.loads import DirectLoads
from offload.memory.resize import set_slots
from offload.memory.storage import Storage
from offload.memory.tiers import TieredLoads, TieredTicket, _Staging
from offload.model.experts import ExpertRuntime
from offload.model.host_experts import HostExperts
from offload.model.transformers_api import EXPERTS_IMPLEMENTATION, ExpertsModule
from tests.model.test_experts import EXPERTS, event, experts_module, mixtral

LAYERS = (2, 5)
MOST = len(LAYERS) * EXPERTS
STAGING = WORKERS = 2
WATCHDOG_S = 120
AWAITS: tuple[tuple[type, str], ...] = (
    (ExpertRuntime, "_start_loads"),
    (ExpertRuntime, "_compute_ready"),
    (Ticket, "wait"),
    (Ticket, "settle"),
    (TieredTicket, "wait"),
    (TieredTicket, "settle"),
    (SimStream, "launch"),
    (SimStream, "wait_until"),
    (SimStream, "pass_by"),
    (SimFence, "wait"),
    (_Staging, "take"),
    (ExpertFile, "read_into"),
)
"""Where the engine thread, the lanes' workers and the pretend card's wait for each other or hand over."""


class Moods:
    """What goes wrong: with the disk, with the card's memory, with how long kernels take; and when to cancel."""

    def __init__(self) -> None:
        self.preadv = os.preadv
        self.hold = Vram.hold
        self.fail = self.short = self.slow = 0.0
        self.random = random.Random(0)
        self.refusals: int | None = None  # the card refuses memory after so many times that it gave some
        self.awaits = 0
        self.cancel: Callable[[], None] | None = None  # called as :attr:`awaits` gets to zero
        self._lock = threading.Lock()

    def reset(self) -> None:
        self.fail, self.refusals, self.cancel = 0.0, None, None

    def install(self, patch: pytest.MonkeyPatch) -> None:
        def hold(vram: Vram, address: int, size: int) -> None:
            if self.refusals is not None:
                self.refusals -= 1
                if self.refusals < 0:
                    raise VramExhausted("refused")
            self.hold(vram, address, size)

        patch.setattr(os, "preadv", self.read)
        patch.setattr(Vram, "hold", hold)
        for owner, name in AWAITS:
            patch.setattr(owner, name, self._awaited(getattr(owner, name)))

    def read(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        """``os.preadv`` with moods."""
        if self.random.random() < self.slow:
            time.sleep(0.002)
        if self.random.random() < self.fail:
            raise OSError(5, "Input/output error")
        if self.random.random() < self.short and len(buffers[0]) > 4096:
            buffers = [buffers[0][:4096]]
        return self.preadv(fd, buffers, offset)

    def compute(self) -> None:
        if self.random.random() < self.slow:
            time.sleep(0.002)

    def _awaited(self, real: Any) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            if (cancel := self.cancel) is not None:
                with self._lock:
                    self.awaits -= 1
                    now = self.awaits == -1
                if now:
                    cancel()
            return real(*args, **options)

        return counted


class MoodyExperts(ExpertCompute):
    """Experts that take their time: what was launched for an event may run long after its end."""

    def __init__(self, moods: Moods) -> None:
        self._inner = NativeExperts()
        self._moods = moods

    def begin(self, *args: Any) -> EventCompute:
        event = self._inner.begin(*args)
        real = event.compute

        def compute(ready: Sequence[ExpertKey]) -> None:
            self._moods.compute()
            real(ready)

        event.compute = compute  # type: ignore[method-assign]
        return event


class Tiers:
    """Two experts modules on a device, their records in a pack, and the tiers between."""

    def __init__(
        self,
        pack: Path,
        modules: list[torch.nn.Module],
        moods: Moods,
        device: str = "simulated",
        slots: int = 4,
        host: int = 4,
        exclusive: bool = False,
    ) -> None:
        self.file = ExpertFile(pack)
        size = self.file.layout(LAYERS[0]).record_bytes
        self.simulated = SimulatedDevice(load_machine("rtx4060")) if device == "simulated" else None
        self.device = self.simulated or CpuDevice()
        arena = self.device.allocate_slots(slots, size, MOST)
        self.tiered: TieredLoads | None = None
        if self.simulated is None:
            self.storage = Storage(self.device, arena, DirectLoads(DiskLane(self.file, WORKERS), arena))
        else:
            host_arena = self.device.allocate_host(host, size, MOST + STAGING)
            tier = HostTier(host, make_policy("ewma"))
            self.tiered = TieredLoads(self.device, self.file, arena, host_arena, tier, WORKERS, STAGING, exclusive)
            self.storage = Storage(self.device, arena, self.tiered, host_arena)
        self.cache = ExpertCache(slots, make_policy("ewma"))
        compute = self.device.experts(MoodyExperts(moods))
        self.runtime = ExpertRuntime(self.cache, arena, self.storage.loads, self.file, get_format("native"), compute)
        self.modules = modules
        self.host: HostExperts | None = None
        if self.simulated is not None and self.tiered is not None:
            self.host = HostExperts(
                MissPlanner(MissRates.of_machine(self.simulated.machine)),
                self.simulated.passage(),
                NativeExperts(),
                dict(zip(LAYERS, modules, strict=True)),
                dict.fromkeys(LAYERS, ExpertWork(size, size / 2)),
                self.tiered,
                self.file,
                get_format("native"),
            )
        self.runtime.attach(
            [ExpertsModule("experts", layer, EXPERTS, {}, m) for layer, m in zip(LAYERS, modules, strict=True)]
        )

    def run(self, which: int, tokens: int, top_k: int) -> torch.Tensor:
        args = event(tokens, top_k)
        self.runtime.current.decode = tokens == 1
        with torch.inference_mode(), self.device.running():
            if self.simulated is not None:
                args = tuple(to_device(part, self.simulated.world) for part in args)  # type: ignore[assignment]
            output: torch.Tensor = self.modules[which](*args)
            return output.to("cpu")

    def set_slots(self, slots: int) -> None:
        self.runtime.settle()
        set_slots(self.runtime, self.storage, slots)

    def set_host(self, buffers: int) -> None:
        self.runtime.settle()
        if self.tiered is not None:
            assert self.tiered.resize_host(buffers) == buffers

    def recover(self) -> None:
        """As :meth:`offload.memory.resize.Rooms.make_room`."""
        self.device.recover()
        self.set_slots(max(1, self.cache.slots - 1))

    @property
    def card_bytes(self) -> int:
        return 0 if self.simulated is None else self.simulated.vram.used

    def check(self) -> None:
        self.cache.check_integrity()
        if self.tiered is not None:
            self.tiered.tier.check_integrity()

    def check_idle(self) -> None:
        """Nothing is under way: every slot, pin and buffer is where it belongs."""
        self.runtime.settle()
        self.check()
        assert not self.cache._loading and not self.runtime._tickets and not self.runtime._ahead
        assert self.cache.slots == len(self.storage.arena.available)
        if self.tiered is not None:
            tier = self.tiered.tier
            assert not tier._pins and not tier._loading
            assert tier.slots + len(self.tiered._spare) == MOST
            assert len(self.tiered.staging) == STAGING

    def close(self) -> None:
        self.runtime.close()
        self.storage.close()
        self.file.close()


class Made:
    """No dataclass: hypothesis would print all of it."""

    def __init__(self, pack: Path, modules: list[torch.nn.Module], expected: dict[Any, torch.Tensor]) -> None:
        self.pack = pack
        self.modules = modules
        self.expected = expected


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A pack, its modules without their weights, and what ``eager`` gives for every event."""
    modules = [experts_module(mixtral(), seed=layer) for layer in LAYERS]
    expected = {
        (which, tokens, top_k): module(*event(tokens, top_k))
        for which, module in enumerate(modules)
        for tokens in (1, 7)
        for top_k in (2, 5)
    }
    pack = tmp_path_factory.mktemp("stress") / "pack"
    pack.mkdir()
    native = get_format("native")
    with open(pack / EXPERT_FILE_NAME, "wb") as file:
        for module in modules:
            weights = {n: p for n, p in module._parameters.items() if p is not None}
            layout = native.layout({n: (tuple(p.shape[1:]), p.dtype) for n, p in weights.items()})
            for expert in range(EXPERTS):
                record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
                native.encode(layout, {n: p[expert] for n, p in weights.items()}, record)
                file.write(record.numpy().tobytes())
            for name in weights:
                del module._parameters[name]
            module.config._experts_implementation = EXPERTS_IMPLEMENTATION  # type: ignore[union-attr]
    layers = tuple(
        LayerLayout(layer, "experts", EXPERTS, 0, number * EXPERTS * layout.record_bytes)
        for number, layer in enumerate(LAYERS)
    )
    checksums = (0,) * (EXPERTS * len(LAYERS))
    Manifest("m", None, "t", "native", "f", (layout,), layers, checksums, (None,) * len(LAYERS)).write(pack)
    return Made(pack, modules, expected)


MOOD = st.sampled_from([0.0, 0.0, 0.3])
EVENT = st.tuples(st.just("event"), st.integers(0, 1), st.sampled_from([1, 1, 7]), st.sampled_from([2, 5]))
STEPS = st.lists(
    st.one_of(
        EVENT,
        EVENT,
        st.tuples(st.just("ahead"), st.integers(0, 1), st.lists(st.integers(0, EXPERTS - 1), max_size=3, unique=True)),
        st.tuples(st.just("slots"), st.integers(1, MOST)),
        st.tuples(st.just("host"), st.integers(0, MOST)),
        st.tuples(st.just("mood"), MOOD, MOOD, MOOD),
        st.tuples(st.just("cancel"), st.integers(0, 80), st.integers(0, 1)),
        st.tuples(st.just("refuse"), st.integers(0, 60), st.integers(0, 1)),
        st.tuples(st.just("budget"), st.integers(0, 3)),
        st.tuples(st.just("miss"), st.sampled_from(["fetch", "cpu", "auto"])),
    ),
    min_size=5,
    max_size=25,
)
PLACES = st.sampled_from(["cpu", "simulated", "simulated", "simulated"])
Expected = dict[tuple[int, int, int], torch.Tensor]


def play(tiers: Tiers, steps: list[Any], moods: Moods, expected: Expected) -> None:
    before = tiers.card_bytes
    for step in steps:
        name, *rest = step
        if name == "event":
            run_event(tiers, moods, expected, *rest)
        elif name == "ahead":
            tiers.runtime._prefetch([(LAYERS[rest[0]], rest[1])])
        elif name == "slots":
            tiers.set_slots(rest[0])
        elif name == "host":
            tiers.set_host(rest[0])
        elif name == "mood":
            moods.fail, moods.short, moods.slow = rest
        elif name == "cancel":
            cancel_at(tiers, moods, expected, *rest)
        elif name == "refuse":
            moods.refusals = rest[0]
            run_event(tiers, moods, expected, rest[1], 7, 5)
            moods.refusals = None
            tiers.device.recover()  # where a read failed first, kernels may have been refused after that
        elif name == "budget" and tiers.simulated is not None:
            vram = tiers.simulated.vram  # no event runs without memory for its sums: only growing is tried
            tiers.device.set_budget(vram.used + rest[0] * tiers.storage.arena.slot_bytes)
            tiers.set_slots(MOST)
            tiers.device.set_budget(vram.total)
        elif name == "miss" and tiers.host is not None:
            tiers.host.planner.strategy = rest[0]
            tiers.runtime.host_experts = None if rest[0] == "fetch" else tiers.host
        tiers.check()
    moods.reset()
    tiers.check_idle()
    for which in range(2):
        assert torch.equal(tiers.run(which, 7, 5), expected[which, 7, 5]), "it goes on after everything"
    tiers.check_idle()
    tiers.set_slots(1)
    gc.collect()
    assert tiers.card_bytes <= before + tiers.storage.arena.slot_bytes, "memory is given back"


def run_event(tiers: Tiers, moods: Moods, expected: Expected, which: int, tokens: int, top_k: int) -> None:
    """An event ends with the right sums or with the error that there is a reason for."""
    try:
        output = tiers.run(which, tokens, top_k)
    except ExpertFileError as error:
        assert moods.fail and "Input/output error" in str(error)
    except Cancelled:
        assert moods.cancel is not None
    except VramExhausted:
        assert moods.refusals is not None
        moods.refusals = None
        tiers.recover()
    else:
        assert torch.equal(output, expected[which, tokens, top_k])


def cancel_at(tiers: Tiers, moods: Moods, expected: Expected, number: int, which: int) -> int:
    """Cancel an event when threads are about to wait or hand over for the ``number``-th time.

    Returns how many times were left: below zero if it came to the cancel.
    """
    moods.awaits, moods.cancel = number, tiers.runtime.cancelled.set
    run_event(tiers, moods, expected, which, 7, 5)
    moods.cancel = None
    tiers.runtime.cancelled.clear()
    return moods.awaits


def with_watchdog(work: Callable[[], None]) -> None:
    """Run on a thread, and fail when it does not come back."""
    pool = ThreadPoolExecutor(1)
    try:
        pool.submit(work).result(timeout=WATCHDOG_S)
    finally:
        pool.shutdown(wait=False)


def campaign(
    made: Made, monkeypatch: pytest.MonkeyPatch, work: Callable[[Tiers, Moods], None], *where: Any, **how: Any
) -> None:
    """``work`` on fresh tiers; nothing is left of them afterwards."""
    moods = Moods()
    with monkeypatch.context() as patch:
        tiers = Tiers(made.pack, made.modules, moods, *where, **how)
        moods.install(patch)
        try:
            with_watchdog(lambda: work(tiers, moods))
        finally:
            moods.reset()
            tiers.close()
        gc.collect()  # errors hold the frames that they passed
        assert tiers.card_bytes == 0, "no tensor of the device is left"


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS, PLACES, st.integers(1, MOST), st.integers(0, MOST), st.booleans())
def test_tiers_and_lanes(
    made: Made, monkeypatch: pytest.MonkeyPatch, steps: list[Any], place: str, slots: int, host: int, exclusive: bool
) -> None:
    def work(tiers: Tiers, moods: Moods) -> None:
        play(tiers, steps, moods, made.expected)

    campaign(made, monkeypatch, work, place, slots, host, exclusive)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS, PLACES, st.integers(1, MOST), st.integers(0, MOST), st.booleans())
def test_tiers_and_lanes_for_long(
    made: Made, monkeypatch: pytest.MonkeyPatch, steps: list[Any], place: str, slots: int, host: int, exclusive: bool
) -> None:
    def work(tiers: Tiers, moods: Moods) -> None:
        play(tiers, steps, moods, made.expected)

    campaign(made, monkeypatch, work, place, slots, host, exclusive)


@pytest.mark.parametrize("place", ["cpu", "simulated"])
def test_a_cancel_wherever_a_thread_waits(made: Made, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def work(tiers: Tiers, moods: Moods) -> None:
        for number in itertools.count():
            tiers.runtime._prefetch([(LAYERS[number % 2], [number % EXPERTS, (number + 1) % EXPERTS])])
            left = cancel_at(tiers, moods, made.expected, number, number % 2)
            tiers.check_idle()
            assert torch.equal(tiers.run(0, 1, 2), made.expected[0, 1, 2])
            if left >= 0:
                break
        assert number >= 10, "there are many such places"

    campaign(made, monkeypatch, work, place, slots=3, host=3)
