"""The CUDA card, and why there is none."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import torch

from offload.config import format_size
from offload.devices.cuda import cuda_is_there
from offload.events import Finding

_DRIVER = Path("/proc/driver/nvidia/version")
_OLDEST = (8, 0)
"""Compute capability that the grouped kernels were compiled and checked for."""


def card() -> list[Finding]:
    """Every card that torch sees, or a machine without one, or what keeps torch from seeing it."""
    if not cuda_is_there():
        return [_without()]
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free = torch.cuda.mem_get_info(number)[0]
        capability = (properties.major, properties.minor)
        text = (
            f"cuda:{number} {properties.name}, {format_size(free)} free of {format_size(properties.total_memory)}, "
            f"capability {capability[0]}.{capability[1]}, CUDA {torch.version.cuda}"
        )
        if capability < _OLDEST:
            found.append(
                Finding("card", "note", f"{text}; older than what the kernels were tried for", "--kernels torch")
            )
        else:
            found.append(Finding("card", "ok", text))
    if importlib.util.find_spec("triton") is None:
        found.append(Finding("card", "note", "experts are computed one by one without triton", "pip install triton"))
    return found


def _without() -> Finding:
    if not _DRIVER.exists() and shutil.which("nvidia-smi") is None:
        return Finding("card", "ok", "no NVIDIA card; the CPU computes")
    if torch.version.cuda is None:
        return Finding(
            "card",
            "note",
            f"there is an NVIDIA driver, but torch {torch.__version__} is built without CUDA; the CPU computes",
            "install a CUDA build: make install TORCH=torch",
        )
    return Finding(
        "card",
        "note",
        "there is an NVIDIA driver, but it offers torch no card; the CPU computes",
        "see what nvidia-smi says, and whether CUDA_VISIBLE_DEVICES hides the card",
    )
