"""The experts function against ``eager`` itself, one experts module at a time, and how it behaves when loads fail."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cache.expert_cache import ExpertCache
from cache.host_tier import HostTier
from cache.keys import ExpertKey
from cache.policies import make_policy
from offload.checkpoint.expert_file import ExpertFile
from offload.checkpoint.formats import get_format
from offload.checkpoint.manifest import EXPERT_FILE_NAME, LayerLayout, Manifest
from offload.compute.native_experts import NativeExperts
from offload.devices import get_device
from offload.devices.simulated import SimulatedDevice
from offload.devices.simulated.tensor import to_device
from offload.errors import Cancelled, ExpertFileError
from offload.memory.lanes import DiskLane
from offload.memory.loads import DirectLoads, Loads
from offload.memory.tiers import TieredLoads
from offload.model.experts import ExpertRuntime
from offload.model.transformers_api import EXPERTS_IMPLEMENTATION, ExpertsModule

EXPERTS, HIDDEN, INNER = 6, 32, 16
DEVICE = "cpu"


@pytest.fixture(autouse=True, params=["cpu", "simulated"])
def every_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of these tests hold on every device."""
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", request.param)


def experts_module(cls: Any, seed: int = 0, **config: Any) -> torch.nn.Module:
    settings = {
        "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "hidden_size": HIDDEN,
        "moe_hidden_size": HIDDEN,
        "moe_intermediate_size": INNER, "intermediate_size": INNER, "hidden_act": "silu", "mlp_hidden_act": "relu",
        "moe_latent_size": None, "rms_norm_eps": 1e-5, "post_norm_eps": 1e-5, "_experts_implementation": "eager",
    }  # fmt: skip
    module: torch.nn.Module = cls(SimpleNamespace(**(settings | config)))
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return module.requires_grad_(False)


class Harness:
    """An experts module whose weights moved into an expert file, and the runtime that serves it."""

    def __init__(self, folder: Path, module: torch.nn.Module, slots: int) -> None:
        weights = {n: p for n, p in module._parameters.items() if p is not None and p.shape[0] == EXPERTS}
        weight_format = get_format("native")
        layout = weight_format.layout({n: (tuple(p.shape[1:]), p.dtype) for n, p in weights.items()})
        folder.mkdir()
        with open(folder / EXPERT_FILE_NAME, "wb") as file:
            for expert in range(EXPERTS):
                record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
                weight_format.encode(layout, {n: p[expert] for n, p in weights.items()}, record)
                file.write(record.numpy().tobytes())
        layers = (LayerLayout(3, "experts", EXPERTS, 0, 0),)
        Manifest("m", None, "t", "native", "f", (layout,), layers, (0,) * EXPERTS, (None,)).write(folder)
        for name in weights:
            del module._parameters[name]
        self.module = module
        self.file = ExpertFile(folder)
        self.cache = ExpertCache(slots, make_policy("lru"))
        self.lane = DiskLane(self.file, 2)
        self.device = get_device(DEVICE)
        arena = self.device.allocate_slots(slots, layout.record_bytes)
        loads: Loads = DirectLoads(self.lane, arena)
        if isinstance(self.device, SimulatedDevice):
            self.device.place(module)  # type: ignore[arg-type]
            host = self.device.allocate_host(2, layout.record_bytes, 5)
            tier = HostTier(2, make_policy("lru"))
            loads = TieredLoads(self.device, self.file, arena, host, tier, 2, 3)
        compute = self.device.experts(NativeExperts())
        self.runtime = ExpertRuntime(self.cache, arena, loads, self.file, weight_format, compute)
        self.runtime.attach([ExpertsModule("experts", 3, EXPERTS, {}, module)])
        module.config._experts_implementation = EXPERTS_IMPLEMENTATION  # type: ignore[union-attr]

    def run(self, *args: torch.Tensor) -> torch.Tensor:
        """One event; arguments and result on the CPU."""
        if not isinstance(self.device, SimulatedDevice):
            return self.module(*args)  # type: ignore[no-any-return]
        with torch.inference_mode(), self.device.running():
            return self.module(*(to_device(arg, self.device.world) for arg in args)).to("cpu")  # type: ignore[no-any-return]

    def close(self) -> None:
        self.runtime.close()
        self.runtime.loads.close()
        self.lane.close()
        self.file.close()
        self.device.close()


def event(tokens: int, top_k: int = 2, beyond: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random hidden states [T, H] and routing [T, k]; ``beyond`` sends some choices to "no expert"."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(tokens)])
    if beyond:
        index[::2, -1] = EXPERTS
    return hidden, index, torch.rand(tokens, top_k, generator=generator)


def mixtral() -> Any:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    return MixtralExperts


@pytest.fixture
def harness(tmp_path: Path) -> Any:
    made = Harness(tmp_path / "pack", experts_module(mixtral()), slots=3)
    yield made
    made.close()


@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("slots", [1, 3, EXPERTS])
def test_equals_eager_with_any_number_of_slots(tokens: int, slots: int, tmp_path: Path) -> None:
    module = experts_module(mixtral())
    expected = [module(*event(tokens)), module(*event(tokens, top_k=3))]
    harness = Harness(tmp_path / "pack", module, slots)
    for _ in range(2):
        assert torch.equal(harness.run(*event(tokens)), expected[0])
        assert torch.equal(harness.run(*event(tokens, top_k=3)), expected[1])
        harness.cache.check_integrity()
    harness.close()


def test_a_norm_after_each_expert(tmp_path: Path) -> None:
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

    module = experts_module(MuseSparkExperts)
    expected = module(*event(9))
    harness = Harness(tmp_path / "pack", module, slots=2)
    assert module.has_post_expert_norm
    assert torch.equal(harness.run(*event(9)), expected)
    harness.close()


def test_sums_in_the_dtype_that_the_family_uses(tmp_path: Path) -> None:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    module = experts_module(NemotronHExperts).to(torch.bfloat16)
    hidden, index, weights = event(5, top_k=4)
    hidden = hidden.to(torch.bfloat16)
    expected = module(hidden, index, weights)  # router weights in float32: so is the sum
    harness = Harness(tmp_path / "pack", module, slots=2)
    assert torch.equal(harness.run(hidden, index, weights), expected)
    harness.close()


@pytest.mark.parametrize("tokens", [1, 8])
def test_ids_beyond_the_last_expert_mean_no_expert(tokens: int, tmp_path: Path) -> None:
    module = experts_module(mixtral())
    expected = module(*event(tokens, beyond=True))
    harness = Harness(tmp_path / "pack", module, slots=2)
    assert torch.equal(harness.run(*event(tokens, beyond=True)), expected)
    assert all(key.expert < EXPERTS for key in harness.cache.resident())
    harness.close()


def test_an_expert_chosen_twice_by_one_token_counts_twice(tmp_path: Path) -> None:
    module = experts_module(mixtral())
    hidden = event(1)[0]
    args = (hidden, torch.tensor([[4, 4]]), torch.tensor([[0.25, 0.5]]))
    expected = module(*args)
    harness = Harness(tmp_path / "pack", module, slots=2)
    assert torch.equal(harness.run(*args), expected)
    harness.close()


def test_a_failed_load_names_the_record_and_leaves_the_cache_usable(harness: Harness, monkeypatch: Any) -> None:
    args = event(6)
    expected = harness.run(*args)
    real = ExpertFile.read_into

    def failing(self: ExpertFile, key: ExpertKey, buffer: memoryview) -> int:
        if key.expert == 2:
            raise ExpertFileError(f"layer {key.layer}, expert {key.expert} failed")
        return real(self, key, buffer)

    monkeypatch.setattr(ExpertFile, "read_into", failing)
    with pytest.raises(ExpertFileError, match="layer 3, expert 2"):
        for _ in range(3):
            harness.run(*args)
    harness.cache.check_integrity()
    assert ExpertKey(3, 2) not in harness.cache.resident()
    monkeypatch.undo()
    assert torch.equal(harness.run(*args), expected)


def test_cancel_leaves_in_the_middle_of_an_event(harness: Harness) -> None:
    harness.runtime.cancelled.set()
    with pytest.raises(Cancelled):
        harness.run(*event(6))
    harness.cache.check_integrity()
    harness.runtime.cancelled.clear()
    harness.run(*event(6))


def test_a_load_left_over_from_a_cancelled_event_is_pending_not_a_hit(harness: Harness) -> None:
    harness.cache.lookup(3, [5])
    harness.runtime._start_loads([ExpertKey(3, 5)])
    harness.cache.end_event()
    args = (event(1)[0], torch.tensor([[5]]), torch.tensor([[1.0]]))
    harness.run(*args)
    assert harness.cache.counters.decode.hits + harness.cache.counters.prefill.hits == 0
    assert harness.cache.counters.decode.pending + harness.cache.counters.prefill.pending == 1


def test_bytes_are_counted_by_phase(harness: Harness) -> None:
    harness.run(*event(1))
    harness.runtime.current.decode = True
    harness.run(event(1)[0], torch.tensor([[5, 0]]), torch.tensor([[0.5, 0.5]]))
    record = harness.file.layout(3).record_bytes
    transfers, counters = harness.runtime.transfers, harness.cache.counters
    assert transfers.prefill_bytes == counters.prefill.misses * record == 2 * record
    assert transfers.decode_bytes == counters.decode.misses * record > 0


def test_a_load_that_cannot_even_start_leaves_nothing_loading(harness: Harness, monkeypatch: Any) -> None:
    def no_thread(*args: object, **options: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(DiskLane, "load", no_thread)
    with pytest.raises(RuntimeError, match="new thread"):
        harness.run(*event(6))
    assert harness.cache.resident() == set()
    harness.cache.check_integrity()
    monkeypatch.undo()
    harness.run(*event(6))
