"""The machines that come with the program: whole, plausible, and every figure with its source."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from cache.hardware import HARDWARE
from cache.machines import Machine, MachineError, load_machine, machine_names


@pytest.mark.parametrize("name", machine_names())
def test_every_figure_has_its_source(name: str) -> None:
    machine = load_machine(name)
    assert machine.name == name and machine.title
    figures = {item.name for item in fields(Machine)} - {"name", "title", "sources"}
    assert machine.sources.keys() == figures
    assert all(len(source) > 15 for source in machine.sources.values())
    assert machine.disk_bytes_per_s < machine.link_bytes_per_s < machine.expert_bytes_per_s
    assert 2**32 <= machine.vram_bytes < machine.ram_bytes


def test_the_cards_that_were_asked_for() -> None:
    assert {"rtx3060", "rtx4060", "rtx4090", "rtx5090", "laptop-pcie3"} <= set(machine_names())
    gib = {name: load_machine(name).vram_bytes / 2**30 for name in machine_names()}
    assert (gib["rtx3060"], gib["rtx4060"], gib["rtx4090"], gib["rtx5090"]) == (12, 8, 24, 32)


def test_replays_use_the_same_rates() -> None:
    for name in machine_names():
        machine, rates = load_machine(name), HARDWARE[name]
        assert rates.link_bytes_per_s == machine.link_bytes_per_s
        assert rates.disk_bytes_per_s == machine.disk_bytes_per_s
        assert rates.expert_bytes_per_s == machine.expert_bytes_per_s


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    data = asdict(load_machine("rtx4060")) | {"name": "mine", "link_bytes_per_s": 1e9}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data))
    assert load_machine(str(path)).link_bytes_per_s == 1e9
    for wrong in ({"link_bytes_per_s": 0}, {"disk_bytes_per_s": "fast"}, {"surprise": 1}, {"vram_bytes": -1}):
        path = tmp_path / f"{next(iter(wrong))}.json"
        path.write_text(json.dumps(data | wrong))
        with pytest.raises(MachineError):
            load_machine(str(path))
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(MachineError, match="not readable"):
        load_machine(str(tmp_path / "torn.json"))
    with pytest.raises(MachineError, match="neither a file nor one of laptop-pcie3, rtx3060"):
        load_machine("gtx")
