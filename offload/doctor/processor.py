"""Processor, compiled kernels and memory."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import psutil

from offload.compute.calibration import machine_key
from offload.compute.kernels import load_kernels
from offload.config import format_size
from offload.events import Finding
from offload.memory.process import available_memory, cgroup_limit

_LEAST_MEMORY = 2**30
"""About what the demo wants to be comfortable."""


def processor() -> list[Finding]:
    """The processor, the cores that this process may use, and whether its kernels work."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = [Finding("processor", "ok", f"{machine_key()}; {cores} cores to use")]
    quota = cpu_quota()
    if quota is not None and quota < cores:
        found.append(
            Finding(
                "processor",
                "note",
                f"the container may use {quota:g} of {cores} cores' time; threads wait for each other",
                f"set OMP_NUM_THREADS={max(1, int(quota))}",
            )
        )
    why: list[str] = []
    kernels = load_kernels(why.append)
    if kernels is None:
        found.append(
            Finding(
                "kernels",
                "note",
                f"quantised weights are multiplied by torch alone, many times slower: {'; '.join(why)}",
                "install a C compiler (gcc or clang)",
            )
        )
    else:
        many = "" if kernels.integer_dot else "; without AVX-512 VNNI, long prompts go through the library's products"
        found.append(Finding("kernels", "ok", f"compiled for this processor{many}"))
    return found


def memory() -> list[Finding]:
    """What ``--ram auto`` may take."""
    machine, limit = psutil.virtual_memory(), cgroup_limit()
    text = f"{format_size(available_memory())} available of {format_size(machine.total)}"
    if limit is not None:
        text += f"; this process group is limited to {format_size(limit)}"
    found = [Finding("memory", "ok", text)]
    if available_memory() < _LEAST_MEMORY:
        found = [Finding("memory", "note", text, "close other programs; run-local plan tells what a model needs")]
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most != resource.RLIM_INFINITY:
        found.append(
            Finding(
                "memory",
                "note",
                f"the address space is limited to {format_size(most)} (ulimit -v); torch alone maps several GiB",
                "ulimit -v unlimited",
            )
        )
    return found


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that the process's group gets (cgroup v2), None if it is not limited."""
    try:
        name = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
    except OSError:
        name = ""
    quotas = []
    group = root / name
    for folder in (group, *group.parents):
        try:
            given, _, period = (folder / "cpu.max").read_text().partition(" ")
            quotas.append(int(given) / int(period))
        except (OSError, ValueError, ZeroDivisionError):  # "max", or not there
            pass
        if folder == root:
            break
    return min(quotas, default=None)
