"""What a machine can move and compute in a second: for the times of a replay."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cache.machines import load_machine, machine_names


class HardwareError(ValueError):
    """A machine that is not known, or rates that make no sense; the message says which there are."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True)
class Hardware:
    """Rates in bytes a second; None means that the lane does not exist.

    Without ``disk_bytes_per_s`` all experts are in RAM; without ``link_bytes_per_s`` the device computes from RAM. An
    expert's product for few tokens takes the time to read its record at ``expert_bytes_per_s``. ``dense_s`` is the time
    of everything but the experts for one token (attention, router, head), ``load_s`` the latency of one load, and
    ``event_s`` the fixed cost of one event on the compute lane. ``host_bytes_per_s`` is the rate at which the CPU
    computes with records in RAM; None if it does not.
    """

    name: str
    disk_bytes_per_s: float | None
    link_bytes_per_s: float | None
    expert_bytes_per_s: float
    dense_s: float = 0.0
    load_s: float = 0.0
    event_s: float = 0.0
    host_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        for rate in ("disk_bytes_per_s", "link_bytes_per_s", "expert_bytes_per_s", "host_bytes_per_s"):
            value = getattr(self, rate)
            if value is None and rate != "expert_bytes_per_s":
                continue
            if not _is_number(value) or value <= 0:
                raise HardwareError(f"hardware {self.name}: {rate} must be above 0, not {value!r}")
        for seconds in ("dense_s", "load_s", "event_s"):
            value = getattr(self, seconds)
            if not _is_number(value) or value < 0:
                raise HardwareError(f"hardware {self.name}: {seconds} must be 0 or above, not {value!r}")
        if self.disk_bytes_per_s is None and self.link_bytes_per_s is None:
            raise HardwareError(f"hardware {self.name}: without disk and link there is nothing to wait for")


def _of_machine(name: str) -> Hardware:
    machine = load_machine(name)
    return Hardware(
        name,
        machine.disk_bytes_per_s,
        machine.link_bytes_per_s,
        machine.expert_bytes_per_s,
        load_s=machine.load_s,
        event_s=machine.event_s,
        host_bytes_per_s=machine.host_bytes_per_s,
    )


# Machines with a GPU have a file each with the sources of their figures (cache/machines). The laptop without one has
# two channels of DDR5-5600 (89.6 GB/s) and a PCIe 4.0 disk.
HARDWARE: dict[str, Hardware] = {name: _of_machine(name) for name in machine_names()} | {
    "laptop": Hardware("laptop", 3e9, None, 60e9, load_s=50e-6, event_s=30e-6)
}


def load_hardware(name: str) -> Hardware:
    """Named hardware, or the rates in a JSON file.

    The file is what ``bench --calibrate`` wrote (its ``disk_bytes_per_s`` and the rate of the kernels or the memory are
    taken), or an object with the fields of :class:`Hardware`. Raises HardwareError.
    """
    if name in HARDWARE:
        return HARDWARE[name]
    path = Path(name)
    if not path.is_file():
        raise HardwareError(f"hardware '{name}' is neither a file nor one of {', '.join(HARDWARE)}")
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise HardwareError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise HardwareError(f"{path}: not an object with rates")
    return _from_fields(data, path)


def _from_fields(data: Mapping[str, Any], path: Path) -> Hardware:
    known = {field.name for field in fields(Hardware)}
    values = {name: data[name] for name in known & data.keys()}
    if "expert_bytes_per_s" not in values:  # a calibration: kernels for quantised weights, else the memory's rate
        rates = [data.get(f"{what}_bytes_per_s") for what in ("int4", "int8", "memory")]
        values["expert_bytes_per_s"] = next((rate for rate in rates if rate is not None), None)
    if values["expert_bytes_per_s"] is None or values.get("disk_bytes_per_s") is None is values.get("link_bytes_per_s"):
        raise HardwareError(
            f"{path}: has no rate of the disk or the link and of the memory; write it with bench --calibrate"
        )
    return Hardware(**{"name": path.stem, "disk_bytes_per_s": None, "link_bytes_per_s": None} | values)
