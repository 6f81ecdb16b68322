"""Devices by name."""

from __future__ import annotations

from offload.devices.base import Device, SlotArena
from offload.devices.cpu import CpuDevice
from offload.errors import UsageError

__all__ = ["Device", "SlotArena", "get_device"]


def get_device(name: str) -> Device:
    """``auto`` picks the best that is supported. Raises UsageError for an unknown name."""
    if name in ("auto", "cpu"):
        return CpuDevice()
    raise UsageError(f"--device: '{name}' is not supported yet; use cpu")
