"""What was measured of a machine is kept, belongs to that machine alone, and never stops a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from offload.compute import calibration
from offload.compute.calibration import (
    Calibration,
    calibrate,
    calibration_file,
    cpu_rates,
    crossover,
    load,
    machine_key,
    save,
)
from offload.compute.kernels import load_kernels
from offload.errors import RunLocalError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RUN_LOCAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def silent(event: Any) -> None:
    pass


def test_figures_come_back(own_cache: Path) -> None:
    figures = Calibration(machine_key(), {4: 64, 8: 8}, 2e10, None, 1.5e10, 1e10)
    assert load() is None
    assert save(figures) == calibration_file()
    assert load() == figures
    assert [path.name for path in own_cache.iterdir()] == ["calibration.json"], "no partial file is left"


@pytest.mark.parametrize("damage", ["{", "[]", "null", '{"version": 99}', '{"version": 1, "few_tokens": 3}'])
def test_a_damaged_file_counts_as_nothing(damage: str) -> None:
    calibration_file().parent.mkdir(parents=True)
    calibration_file().write_text(damage)
    assert load() is None


def test_operations_are_known_for_all_weights_or_not_at_all() -> None:
    without = Calibration("", {}, flops_per_s=4e11)
    assert without.flops() == {0: 4e11, 4: 4e11, 8: 4e11}, "without kernels the library multiplies"
    assert Calibration("", {4: 16, 8: 16}, flops_per_s=4e11, int4_flops_per_s=7e11).flops() is None
    assert Calibration("", {}).flops() is None


def test_another_machines_figures_are_not_ours() -> None:
    save(Calibration("another machine", {4: 1, 8: 1}))
    assert load() is None


def test_the_crossover_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(calibration, "_measure_crossover", lambda *args: measured.append(1) or {4: 24, 8: 4})
    some_kernels: Any = object()
    assert crossover(some_kernels, silent) == {4: 24, 8: 4} == crossover(some_kernels, silent)
    assert len(measured) == 1
    assert crossover(None, silent) == {}, "without kernels there is nothing to decide"


def test_rates_of_the_cpu_are_measured_once_and_kept_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []
    monkeypatch.setattr(calibration, "_memory_rate", lambda: measured.append("memory") or 2e10)
    monkeypatch.setattr(calibration, "_kernel_rate", lambda products, bits: measured.append(bits) or bits * 1e9)
    monkeypatch.setattr(calibration, "_flops", lambda: measured.append("flops") or 1e11)
    monkeypatch.setattr(calibration, "_kernel_flops", lambda products, bits: measured.append(f"{bits} flops") or 3e11)
    monkeypatch.setattr(calibration, "_measure_crossover", lambda *args: {4: 24, 8: 4})
    some_kernels: Any = object()
    assert cpu_rates("native", None, silent) == (2e10, 1e11) == cpu_rates("native", None, silent)
    crossover(some_kernels, silent)
    assert cpu_rates("int4-g32", some_kernels, silent) == (4e9, 3e11) == cpu_rates("mixed", some_kernels, silent)
    assert cpu_rates("int8", some_kernels, silent) == (8e9, 3e11)
    assert cpu_rates("int8", None, silent) == (2e10, 1e11), "without kernels the memory is all that is known"
    assert measured == ["memory", "flops", 4, "4 flops", 8, "8 flops"]
    assert crossover(some_kernels, silent) == {4: 24, 8: 4}


def test_a_cache_folder_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RUN_LOCAL_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(calibration, "_measure_crossover", lambda *args: {4: 24, 8: 4})
    some_kernels: Any = object()
    assert crossover(some_kernels, silent) == {4: 24, 8: 4}
    with pytest.raises(RunLocalError, match=r"calibration\.json: cannot be written"):
        save(Calibration(machine_key(), {}))


def test_calibrate_measures_everything_and_leaves_no_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_PROBE_BYTES", 16 * 2**20)
    monkeypatch.setattr(calibration, "_SECONDS", 0.05)
    monkeypatch.setattr(calibration, "_TRIALS", (18, 20))
    found = calibrate(tmp_path / "packs", silent)
    assert list((tmp_path / "packs").iterdir()) == []
    assert found.memory_bytes_per_s and found.memory_bytes_per_s > 0
    assert found.disk_bytes_per_s is None or found.disk_bytes_per_s > 0
    if load_kernels() is not None:
        assert set(found.few_tokens) == {4, 8} and set(found.few_tokens.values()) <= {16, 18, 20}
        assert found.int4_bytes_per_s and found.int8_bytes_per_s
        assert found.flops() == {0: found.flops_per_s, 4: found.int4_flops_per_s, 8: found.int8_flops_per_s}
    assert json.loads(json.dumps(found.to_json()))["version"] == 5
    assert all(len(row) == 3 and all(isinstance(cell, str) for cell in row) for row in found.rows())


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no O_DIRECT, so no disk is measured")
def test_a_full_disk_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(calibration, "_write_probe", full)
    with pytest.raises(RunLocalError, match=r"No space left.*--experts-dir"):
        calibration._disk_rate(tmp_path, silent)
