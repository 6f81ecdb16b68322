"""Random events, prefetches, sizes, failures and cancels over the tiers: right sums, no deadlock, nothing leaked."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable
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
from offload.compute.native_experts import NativeExperts
from offload.devices.simulated import SimulatedDevice
from offload.devices.simulated.tensor import to_device
from offload.errors import Cancelled, ExpertFileError
from offload.memory.resize import set_slots
from offload.memory.storage import Storage
from offload.memory.tiers import TieredLoads
from offload.model.experts import ExpertRuntime
from offload.model.host_experts import HostExperts
from offload.model.transformers_api import EXPERTS_IMPLEMENTATION, ExpertsModule
from tests.model.test_experts import EXPERTS, event, experts_module, mixtral

LAYERS = (2, 5)
WATCHDOG_S = 120


class Disk:
    """``os.preadv`` with moods."""

    def __init__(self) -> None:
        self.real = os.preadv
        self.fail = self.short = self.slow = 0.0
        self.random = random.Random(0)

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        if self.random.random() < self.slow:
            time.sleep(0.002)
        if self.random.random() < self.fail:
            raise OSError(5, "Input/output error")
        if self.random.random() < self.short and len(buffers[0]) > 4096:
            buffers = [buffers[0][:4096]]
        return self.real(fd, buffers, offset)


class Tiers:
    """Two experts modules on the simulated device, their records in a pack, and the tiers between."""

    def __init__(self, pack: Path, modules: list[torch.nn.Module], slots: int, host: int, exclusive: bool) -> None:
        self.device = SimulatedDevice(load_machine("rtx4060"))
        self.file = ExpertFile(pack)
        size = self.file.layout(LAYERS[0]).record_bytes
        most = len(LAYERS) * EXPERTS
        arena = self.device.allocate_slots(slots, size, most)
        host_arena = self.device.allocate_host(host, size, most + 2)
        self.tier = HostTier(host, make_policy("ewma"))
        self.loads = TieredLoads(self.device, self.file, arena, host_arena, self.tier, 2, 2, exclusive)
        self.storage = Storage(self.device, arena, self.loads, host_arena)
        self.cache = ExpertCache(slots, make_policy("ewma"))
        compute = self.device.experts(NativeExperts())
        self.runtime = ExpertRuntime(self.cache, arena, self.loads, self.file, get_format("native"), compute)
        self.modules = modules
        self.host = HostExperts(
            MissPlanner(MissRates.of_machine(self.device.machine)),
            self.device.passage(),
            NativeExperts(),
            dict(zip(LAYERS, modules, strict=True)),
            dict.fromkeys(LAYERS, ExpertWork(size, size / 2)),
            self.loads,
            self.file,
            get_format("native"),
        )
        self.runtime.attach(
            [ExpertsModule("experts", layer, EXPERTS, {}, m) for layer, m in zip(LAYERS, modules, strict=True)]
        )

    def run(self, which: int, tokens: int, top_k: int) -> torch.Tensor:
        hidden, index, weights = (to_device(part, self.device.world) for part in event(tokens, top_k))
        self.runtime.current.decode = tokens == 1
        with torch.inference_mode(), self.device.running():
            output: torch.Tensor = self.modules[which](hidden, index, weights)
            return output.to("cpu")

    def check(self) -> None:
        self.cache.check_integrity()
        self.tier.check_integrity()

    def check_idle(self) -> None:
        self.runtime.settle()
        self.check()
        assert not self.tier._pins and not self.tier._loading and not self.cache._loading
        assert len(self.loads.staging) == 2
        assert self.cache.slots == len(self.storage.arena.available)

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
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("event"), st.integers(0, 1), st.sampled_from([1, 1, 7]), st.sampled_from([2, 5])),
        st.tuples(st.just("event"), st.integers(0, 1), st.just(1), st.just(2)),
        st.tuples(st.just("ahead"), st.integers(0, 1), st.lists(st.integers(0, EXPERTS - 1), max_size=3, unique=True)),
        st.tuples(st.just("slots"), st.integers(1, 12)),
        st.tuples(st.just("host"), st.integers(0, 12)),
        st.tuples(st.just("mood"), MOOD, MOOD, MOOD),
        st.tuples(st.just("cancel"), st.integers(0, 3)),
        st.tuples(st.just("vram"), st.booleans()),
        st.tuples(st.just("miss"), st.sampled_from(["fetch", "cpu", "auto"])),
    ),
    min_size=5,
    max_size=25,
)


def play(tiers: Tiers, steps: list[Any], disk: Disk, expected: dict[Any, torch.Tensor]) -> None:
    before = tiers.device.vram.used
    for step in steps:
        name, *rest = step
        if name == "event":
            which, tokens, top_k = rest
            try:
                output = tiers.run(which, tokens, top_k)
            except ExpertFileError as error:
                assert disk.fail and "Input/output error" in str(error)
            except Cancelled:
                tiers.runtime.cancelled.clear()
            else:
                assert torch.equal(output, expected[which, tokens, top_k])
        elif name == "ahead":
            tiers.runtime._prefetch((LAYERS[rest[0]], rest[1]))
        elif name == "slots":
            tiers.runtime.settle()
            set_slots(tiers.runtime, tiers.storage, rest[0])
        elif name == "host":
            tiers.runtime.settle()
            tiers.loads.resize_host(rest[0])
        elif name == "mood":
            disk.fail, disk.short, disk.slow = rest
        elif name == "cancel":
            cancel_at_read(tiers, rest[0])
        elif name == "miss":
            tiers.host.planner.strategy = rest[0]
            tiers.runtime.host_experts = None if rest[0] == "fetch" else tiers.host
        elif name == "vram":
            vram = tiers.device.vram
            vram.budget = vram.used if rest[0] else vram.total
            if rest[0]:  # no event runs without memory for its sums: only growing is tried
                set_slots_settled(tiers, 12)
                vram.budget = vram.total
        tiers.check()
    disk.fail = 0
    tiers.check_idle()
    for which in range(2):
        assert torch.equal(tiers.run(which, 7, 5), expected[which, 7, 5]), "it goes on after everything"
    tiers.check_idle()
    set_slots_settled(tiers, 1)
    gc.collect()
    assert tiers.device.vram.used <= before + tiers.storage.arena.slot_bytes, "memory is given back"


def set_slots_settled(tiers: Tiers, slots: int) -> None:
    tiers.runtime.settle()
    set_slots(tiers.runtime, tiers.storage, slots)


def cancel_at_read(tiers: Tiers, number: int) -> None:
    """Cancel as the next event waits for its ``number``-th load."""
    real, count = tiers.runtime._finish_load, [0]

    def counted(key: ExpertKey) -> None:
        real(key)
        count[0] += 1
        if count[0] > number:
            tiers.runtime.cancelled.set()

    tiers.runtime._finish_load = counted  # type: ignore[method-assign]
    try:
        tiers.run(number % 2, 7, 5)
    except (Cancelled, ExpertFileError):
        pass
    finally:
        tiers.runtime._finish_load = real  # type: ignore[method-assign]
        tiers.runtime.cancelled.clear()


def with_watchdog(work: Callable[[], None]) -> None:
    """Run on a thread, and fail when it does not come back."""
    pool = ThreadPoolExecutor(1)
    try:
        pool.submit(work).result(timeout=WATCHDOG_S)
    finally:
        pool.shutdown(wait=False)


def campaign(
    made: Made, steps: list[Any], slots: int, host: int, exclusive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk()
    with monkeypatch.context() as patch:
        tiers = Tiers(made.pack, made.modules, slots, host, exclusive)
        patch.setattr(os, "preadv", disk.preadv)
        try:
            with_watchdog(lambda: play(tiers, steps, disk, made.expected))
        finally:
            disk.fail = 0
            tiers.close()
        gc.collect()  # errors hold the frames that they passed
        assert tiers.device.vram.used == 0, "no tensor of the device is left"


@pytest.mark.slow  # now and then a worker frees a tensor late, and the pretend card's tight budget counts it still
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS, st.integers(1, 12), st.integers(0, 12), st.booleans())
def test_tiers_and_lanes(
    made: Made, monkeypatch: pytest.MonkeyPatch, steps: list[Any], slots: int, host: int, exclusive: bool
) -> None:
    campaign(made, steps, slots, host, exclusive, monkeypatch)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS, st.integers(1, 12), st.integers(0, 12), st.booleans())
def test_tiers_and_lanes_for_long(
    made: Made, monkeypatch: pytest.MonkeyPatch, steps: list[Any], slots: int, host: int, exclusive: bool
) -> None:
    campaign(made, steps, slots, host, exclusive, monkeypatch)
