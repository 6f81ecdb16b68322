"""Rates by name and from files; nonsense is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cache.hardware import HARDWARE, HardwareError, load_hardware


def test_every_named_machine_loads() -> None:
    for name in HARDWARE:
        assert load_hardware(name).name == name


def test_a_calibration_is_a_machine(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    rates = {"disk_bytes_per_s": 1.8e9, "memory_bytes_per_s": 4e10, "int4_bytes_per_s": None, "int8_bytes_per_s": 3e10}
    path.write_text(json.dumps(rates | {"machine": "a CPU", "few_tokens": {}, "version": 1}))
    hardware = load_hardware(str(path))
    assert (hardware.disk_bytes_per_s, hardware.link_bytes_per_s, hardware.expert_bytes_per_s) == (1.8e9, None, 3e10)
    assert hardware.name == "calibration"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not readable as JSON"),
        ("[]", "not an object"),
        ("{}", "bench --calibrate"),
        ('{"disk_bytes_per_s": 1e9}', "bench --calibrate"),
        ('{"disk_bytes_per_s": 0, "memory_bytes_per_s": 1}', "above 0"),
        ('{"disk_bytes_per_s": "fast", "memory_bytes_per_s": 1}', "above 0"),
        ('{"disk_bytes_per_s": 1, "memory_bytes_per_s": 1, "dense_s": -1}', "0 or above"),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "h.json").write_text(text)
    with pytest.raises(HardwareError, match=reason):
        load_hardware(str(tmp_path / "h.json"))


def test_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(HardwareError, match="rtx4090"):
        load_hardware("abacus")
