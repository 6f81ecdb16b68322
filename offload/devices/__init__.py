"""Devices by name: ``cpu``, ``cuda``, ``simulated`` or ``simulated:MACHINE``."""

from __future__ import annotations

from collections.abc import Callable

from offload.devices.base import Device, SlotArena
from offload.errors import UsageError

__all__ = ["Device", "SlotArena", "get_device"]

DEFAULT_MACHINE = "rtx4060"


def _cpu(detail: str) -> Device:
    from offload.devices.cpu import CpuDevice

    return CpuDevice()


def _cuda(detail: str) -> Device:
    from offload.devices.cuda import open_cuda

    return open_cuda(detail)


def _simulated(detail: str) -> Device:
    from cache.machines import MachineError, load_machine
    from offload.devices.simulated import SimulatedDevice

    try:
        return SimulatedDevice(load_machine(detail or DEFAULT_MACHINE))
    except MachineError as error:
        raise UsageError(f"--device simulated: {error}") from error


def _auto(detail: str) -> Device:
    from offload.devices.cuda import cuda_is_there

    return _cuda("") if cuda_is_there() else _cpu("")


_DEVICES: dict[str, Callable[[str], Device]] = {"auto": _auto, "cpu": _cpu, "cuda": _cuda, "simulated": _simulated}


def get_device(name: str) -> Device:
    """A fresh device; whoever asked closes it. ``auto`` is a CUDA card if there is one, else the CPU.

    Raises UsageError for an unknown name, DeviceError where the device is not there.
    """
    kind, _, detail = name.partition(":")
    if kind not in _DEVICES:
        raise UsageError(f"--device: '{name}' is not one of {', '.join(_DEVICES)}")
    return _DEVICES[kind](detail)
