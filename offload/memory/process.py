"""What this process and this machine have of memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Resident bytes: ``anonymous`` belong to the process alone, ``file`` are mapped files (libraries)."""

    anonymous: int
    file: int

    @property
    def total(self) -> int:
        return self.anonymous + self.file


def process_memory() -> ProcessMemory:
    """Resident memory of this process now. Where the system does not tell the kinds apart, all is anonymous."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        size = {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "RssShmem")}
    except (OSError, KeyError, ValueError, IndexError):
        return ProcessMemory(psutil.Process().memory_info().rss, 0)
    return ProcessMemory(size["RssAnon"] + size["RssShmem"], size["RssFile"])


def rss_bytes() -> int:
    return process_memory().total


def rss_peak_bytes() -> int:
    """The most resident memory this process has had, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_ALLOCATOR = {-8: 2, -3: 2**20, -1: 2**20}
"""glibc's mallopt: at most 2 arenas; blocks from 1 MiB on are mapped, so that freeing them gives them back; the heap's
free end is trimmed from 1 MiB on. The defaults adapt upwards and keep hundreds of MiB of freed tensors."""


def bound_own_memory() -> None:
    """Make this process's memory predictable; call once, before the first matrix product.

    oneDNN keeps compiled kernels, up to 0.5 MiB for every shape it has seen, and so does torch's layer above it; a
    prefill gives every expert another number of tokens. Their default of 1024 shapes each took 340 MiB here, 16 take
    under 20 MiB and no more time. A capacity that the user has set stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "16")
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _ALLOCATOR.items():
            mallopt(option, value)


def release_free_memory() -> None:
    """Hand memory that Python and the allocator no longer use back to the system, as far as they can."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def available_memory() -> int:
    """Bytes that this process may still take: free memory of the machine, and of its cgroup where that is less."""
    available: int = psutil.virtual_memory().available
    limit = cgroup_limit()
    if limit is not None:
        available = min(available, max(0, limit - rss_bytes()))
    return available


def cgroup_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """The tightest memory limit of this process's cgroup and its ancestors in bytes (v1 or v2), or None."""
    limits = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "unknown", "")
        if controllers == "":
            base, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        # inside a container the path may be the host's; then the mount itself is the group
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                text = "max"
            if text.isdigit() and int(text) < 2**60:
                limits.append(int(text))
            if folder == base:
                break
    return min(limits, default=None)
