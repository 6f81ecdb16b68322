"""What a plan for this machine's processor says to expect, from its rates."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache.expected import made_hit_rate, made_settings
from offload.compute import calibration
from offload.compute.calibration import Calibration
from offload.config import EngineSettings
from offload.memory.expect import CpuEstimate, CpuRates, cpu_estimate
from offload.memory.plan import Baseline, ModelSizes, Plan, make_plan
from offload.opening import plan_only
from offload.planned import smaller_formats
from tests.tiny_models import build_tiny

GIB = 2**30
SIZES = ModelSizes(2 * GIB, 0, 0, 2**21, 6144, 4096)
RATES = CpuRates(disk=2e9, experts=20e9, dense=20e9)


def planned(ram: int | None = None, available: int = 64 * GIB) -> Plan:
    return make_plan("m", "cpu", SIZES, Baseline(0, 0), available, ram)


def test_the_disk_or_the_memory_holds_it_back() -> None:
    small = cpu_estimate(planned(6 * GIB), 384, 0.5, RATES)
    assert small.bottleneck == "disk"
    misses = 384 * 2**21 * 0.5
    assert small.disk_s == pytest.approx(misses / 2e9)
    assert small.compute_s == pytest.approx((2 * GIB + 384 * 2**21) / 20e9)
    assert small.tokens_per_s == pytest.approx(1 / (2 * GIB / 20e9 + misses / 2e9 + misses / 20e9))
    assert make_plan("m", "cpu", SIZES, Baseline(0, 0), 0, small.all_ram_bytes).residency == 1
    assert "14.05 GiB" in small.summary()[1] and "disk" in small.summary()[0]
    assert "--format" not in small.summary()[1]
    whole = cpu_estimate(planned(), 384, 1.0, RATES, ("--format int4",))
    assert whole.bottleneck == "memory" and whole.disk_s == 0 and whole.tokens_per_s > small.tokens_per_s
    assert whole.summary()[1] == "to go faster: fewer bytes for the processor to read: --format int4"
    assert "no flag helps" in cpu_estimate(planned(), 384, 1.0, RATES).summary()[1]
    assert whole.to_json()["tokens_per_s"] == whole.tokens_per_s


def test_no_flag_is_advised_that_is_given_already() -> None:
    both = ("--format int4", "--dense-format int8")
    assert smaller_formats(EngineSettings()) == smaller_formats(EngineSettings(format="int8")) == both
    assert smaller_formats(EngineSettings(format="int4-g32")) == ("--dense-format int8",)
    assert smaller_formats(EngineSettings(format="int4", dense_format="int8")) == ()


def test_an_automatic_budget_says_what_it_leaves() -> None:
    automatic = planned(available=8 * GIB)
    assert automatic.left == 8 * GIB - automatic.budget > 0
    assert automatic.summary()[0].endswith("; 819 MiB of the free RAM are left to the desktop and others")
    assert planned(6 * GIB).left is None and "left to" not in planned(6 * GIB).summary()[0]


@pytest.mark.parametrize(("layers", "experts", "top_k"), [(6, 8, 2), (4, 64, 4), (1, 4, 1), (3, 8, 8)])
def test_a_made_trace_of_any_shape(layers: int, experts: int, top_k: int) -> None:
    assert made_settings(layers, experts, top_k).layers == layers
    total = layers * experts
    rates = [made_hit_rate(layers, experts, top_k, max(1, total * share // 8), "lru", "layer") for share in (2, 4, 8)]
    assert rates == sorted(rates) and 0 <= rates[0] <= rates[-1] == 1


def test_plan_knows_this_machine_once_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "calibration_file", lambda: tmp_path / "calibration.json")
    folder = build_tiny("qwen3_moe", tmp_path / "model")
    settings = EngineSettings(model=str(folder), context_tokens=64, residency=0.5)
    before = plan_only(settings, lambda event: None)
    assert before.expected is None and before.to_json()["expected"] is None
    assert "bench --calibrate" in before.summary()[-1] and before.to_json()["hint"] == before.summary()[-1]
    key = calibration.machine_key()
    calibration.save(Calibration(key, {}, memory_bytes_per_s=1e10, disk_bytes_per_s=1e8))
    after = plan_only(settings, lambda event: None)
    assert isinstance(after.expected, CpuEstimate) and after.expected.bottleneck == "disk"
    assert 0.3 < after.expected.hit_rate < 1
    assert after.summary()[-2].startswith("expected on this machine: ") and after.hint is None
    assert after.to_json()["expected"]["bottleneck"] == "disk"
    quantised = EngineSettings(model=str(folder), context_tokens=64, residency=0.5, format="int4")
    assert plan_only(quantised, lambda event: None).expected is None, "that rate was not measured"


def test_a_simulated_machine_is_known(tmp_path: Path) -> None:
    folder = build_tiny("qwen3_moe", tmp_path / "model")
    settings = EngineSettings(model=str(folder), context_tokens=64, residency=0.5, device="simulated:rtx4090")
    found = plan_only(settings, lambda event: None)
    assert found.expected is not None and any("RTX 4090" in line for line in found.summary())
    assert found.to_json()["vram_left_bytes"] > 0
