"""Tells one checkpoint from another without reading all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from offload.checkpoint.gguf_file import gguf_files
from offload.checkpoint.model_folder import config_path, side_folder

_SAMPLES = 16  # a file; more would be slow on a hard disk
_SAMPLE = 4096
_GGUF_START = 2**20  # holds most of what the header says, and need not hold all


def checkpoint_fingerprint(folder: Path) -> str:
    """16 hex digits over config.json and, of every file of weights, its name, size, header and some weights.

    Samples spread evenly over each file, its end included, tell a retrained checkpoint from the original; times and
    paths do not count, so a copied or moved checkpoint keeps its pack.
    """
    config = config_path(side_folder(folder))
    digest = hashlib.sha256(config.read_bytes() if config.exists() else b"")
    safetensors = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    for file in safetensors or gguf_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with open(file, "rb") as handle:
            header = int.from_bytes(handle.read(8), "little") if safetensors else _GGUF_START
            digest.update(handle.read(min(header, size)))
            last = max(0, size - _SAMPLE)
            for number in range(1, _SAMPLES + 1):
                handle.seek(last * number // _SAMPLES)
                digest.update(handle.read(_SAMPLE))
    return digest.hexdigest()[:16]
