"""The folders that hold packs and models, and how the disk below them reads."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from offload.checkpoint.cached_models import cached_models
from offload.checkpoint.library import list_packs
from offload.compute.calibration import load
from offload.config import format_size
from offload.events import Finding
from offload.paths import cache_folder

_LITTLE_SPACE = 2 * 2**30
_SLOW_DISK = 300e6
_BLOCK = 4096


def storage() -> list[Finding]:
    """The cache folder, its packs, and the hub's own cache."""
    return [*cache(cache_folder()), _rates(), *_packs(), *_hub()]


def cache(folder: Path) -> list[Finding]:
    """Whether ``folder`` can be written, has room, and can be read past the page cache."""
    place = folder
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK) or not place.is_dir():
        return [
            Finding(
                "storage",
                "problem",
                f"{folder} cannot be written: no pack and no demo model can be made",
                "make it writable, or name another folder with RUN_LOCAL_CACHE",
            )
        ]
    free = shutil.disk_usage(place).free
    text = f"packs go to {folder}, {format_size(free)} free"
    found = [Finding("storage", "ok", text)]
    if free < _LITTLE_SPACE:
        found = [Finding("storage", "note", text, "free some, or name another disk with --experts-dir")]
    if not reads_directly(place):
        found.append(
            Finding(
                "storage",
                "note",
                f"the file system of {place} has no direct reads: experts pass through the page cache, which takes RAM",
                "packs on a local disk (ext4, xfs, btrfs): --experts-dir",
            )
        )
    return found


def reads_directly(folder: Path) -> bool:
    """Whether a file in ``folder`` can be read with O_DIRECT; tries it with one block."""
    if not hasattr(os, "O_DIRECT"):
        return False
    with suppress(OSError), tempfile.NamedTemporaryFile(dir=folder, prefix="probe-") as file:
        file.write(bytes(_BLOCK))
        file.flush()
        fd = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, _BLOCK) as block:
                return os.preadv(fd, [block], 0) == _BLOCK
        finally:
            os.close(fd)
    return False


def _rates() -> Finding:
    known = load()
    if known is None or known.disk_bytes_per_s is None:
        return Finding(
            "storage",
            "note",
            "disk and memory were not measured yet; estimates are rough",
            "run-local bench --calibrate",
        )
    rate = known.disk_bytes_per_s
    text = f"random reads at {rate / 1e9:.1f} GB/s when it was last measured"
    if rate < _SLOW_DISK:
        return Finding("storage", "note", text, "experts on a faster disk: --experts-dir")
    return Finding("storage", "ok", text)


def _packs() -> list[Finding]:
    packs = list_packs()
    whole = [pack for pack in packs if pack.complete]
    size = format_size(sum(pack.bytes for pack in whole))
    found = [Finding("packs", "ok", f"{len(whole)} packs, {size}" if whole else "none yet; a first chat makes one")]
    return found + [
        Finding(
            "packs",
            "note",
            f"{pack.name} is incomplete or damaged ({format_size(pack.bytes)})",
            f"pack it again, or run-local models --remove {pack.name}",
        )
        for pack in packs
        if not pack.complete
    ]


def _hub() -> list[Finding]:
    from huggingface_hub import constants, get_token

    models = cached_models()
    text = f"{len(models)} MoE models in {constants.HF_HUB_CACHE}"
    access = "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else f"{'a' if get_token() else 'no'} token is set"
    return [Finding("hub", "ok", f"{text}; {access}")]
