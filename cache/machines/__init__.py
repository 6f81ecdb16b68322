"""Machines by name: what a graphics card and the computer around it can hold, move and compute.

One JSON file each; every figure has its source under ``sources``, and what is assumed says so.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any


class MachineError(ValueError):
    """A machine that is not known, or figures that make no sense; the message says which there are."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Sizes in bytes, rates in bytes (or floating point operations) a second, latencies in seconds.

    ``expert_bytes_per_s`` and ``flops_per_s`` are the rates at which the device streams weights from its own memory and
    multiplies, ``host_bytes_per_s`` and ``host_flops_per_s`` the CPU's. ``launch_s`` is what starting one operation
    costs the CPU, ``event_s`` what an event costs beside its bytes, ``load_s`` what starting one copy costs.
    """

    name: str
    title: str
    vram_bytes: int
    ram_bytes: int
    expert_bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float
    disk_bytes_per_s: float
    host_bytes_per_s: float
    host_flops_per_s: float
    launch_s: float
    event_s: float
    load_s: float
    sources: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("name", "title", "sources"):
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if (
                not number
                or value < 0
                or (value == 0 and not item.name.endswith("_s"))
                or (value == 0 and item.name.endswith("_per_s"))
            ):
                raise MachineError(f"machine {self.name}: {item.name} must be above 0, not {value!r}")


def machine_names() -> list[str]:
    """The machines that come with the program."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.json"))


@cache
def load_machine(name: str) -> Machine:
    """A named machine, or one that a JSON file of the same form describes. Raises MachineError."""
    path = Path(__file__).with_name(f"{name}.json") if name in machine_names() else Path(name)
    if not path.is_file():
        raise MachineError(f"'{name}' is neither a file nor one of {', '.join(machine_names())}")
    try:
        data: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise MachineError(f"{path}: not readable as JSON ({error})") from error
    known = {item.name for item in fields(Machine)}
    if not isinstance(data, dict) or not known - {"sources"} <= data.keys() <= known:
        raise MachineError(f"{path}: a machine has exactly the fields {', '.join(sorted(known))}")
    return Machine(**data)
