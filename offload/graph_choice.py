"""Whether decode passes are replayed as graphs: what ``--graphs`` says, and what is known of the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offload.config import EngineSettings
from offload.devices.base import Device
from offload.devices.confirmed import is_confirmed
from offload.devices.graphs import GraphRecorder
from offload.events import GraphUse

NOTHING_TO_LAUNCH = "there is nothing to choose on a CPU: its operations are called, not launched"


@dataclass(frozen=True, slots=True)
class GraphChoice:
    """``recorder`` makes the graphs; where it is None, ``use`` says why (None: the device has none)."""

    recorder: GraphRecorder | None = None
    use: GraphUse | None = None

    @classmethod
    def of(cls, settings: EngineSettings, device: Device, shared_passes: bool, dtype: torch.dtype) -> GraphChoice:
        """For a model of ``dtype``; for the rest see :func:`why_no_graphs`."""
        if not device.has_graphs:
            return cls()
        reason = why_no_graphs(settings, device, shared_passes)
        return cls(device.graphs(dtype)) if reason is None else cls(use=GraphUse(False, reason))


def why_no_graphs(settings: EngineSettings, device: Device, shared_passes: bool) -> str | None:
    """Why a device that has graphs does without them; None: it uses them. ``shared_passes``: of rows of a batch."""
    if settings.graphs == "off":
        return "--graphs off"
    if shared_passes:
        return "rows of a batch share passes"
    if settings.graphs == "on":
        return None
    card = device.card()
    if card is None:
        return "auto: there is no card to try them on"
    return None if is_confirmed(card) else f"auto: tests/gpu has not confirmed them on {card}"
