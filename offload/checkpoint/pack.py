"""From a checkpoint to an expert file: streaming, resumable, atomic.

The pack grows in ``NAME.partial`` and is renamed when it is complete, so a folder without that suffix is whole. A
journal in it lists the checksums of the records that are safely on disk: data is synced before its journal line is
written, so a resumed pack trusts exactly the journalled records and writes the rest again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch

from offload.checkpoint.fingerprint import checkpoint_fingerprint
from offload.checkpoint.formats import get_format
from offload.checkpoint.journal import JOURNAL_NAME, PARTIAL_SUFFIX, append, resumable, start_journal
from offload.checkpoint.lock import pack_lock
from offload.checkpoint.manifest import EXPERT_FILE_NAME, LayerLayout, Manifest, RecordLayout
from offload.checkpoint.source import CheckpointSource
from offload.config import format_size
from offload.errors import ExpertFileError
from offload.events import LoadProgress

_SPARE_BYTES = 64 * 2**20  # what a pack leaves free on the disk


def plan_manifest(source: CheckpointSource, model: str, revision: str | None, format_name: str) -> Manifest:
    """The manifest that packing ``source`` will give, but for its checksums (all 0). Reads no weights."""
    weight_format = get_format(format_name)
    layouts: list[RecordLayout] = []
    layers = []
    offset = 0
    for module in sorted(source.experts, key=lambda module: module.layer):
        layout = weight_format.layout(module.tensors)
        if layout not in layouts:
            layouts.append(layout)
        layers.append(LayerLayout(module.layer, module.path, module.num_experts, layouts.index(layout), offset))
        offset += module.num_experts * layout.record_bytes
    return Manifest(
        model=model,
        revision=revision,
        model_type=source.config.model_type,
        format=format_name,
        fingerprint=checkpoint_fingerprint(source.folder),
        layouts=tuple(layouts),
        layers=tuple(layers),
        checksums=(0,) * sum(layer.experts for layer in layers),
    )


def pack(
    source: CheckpointSource, manifest: Manifest, folder: Path, on_event: Callable[[LoadProgress], None]
) -> Manifest:
    """Write the pack that ``manifest`` plans into ``folder``, going on where an earlier try stopped.

    Returns the manifest with checksums. Memory: a few experts. Raises ExpertFileError if another process packs
    there, the disk is too small (before anything is written) or a write fails (what is written is kept and resumed).
    """
    with pack_lock(folder):
        if (folder / EXPERT_FILE_NAME).exists():  # another process packed it a moment ago
            return Manifest.read(folder)
        partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
        checksums = resumable(partial, manifest)
        try:
            _check_space(folder, manifest, len(checksums))
            partial.mkdir(exist_ok=True)
            with start_journal(partial, manifest, checksums) as journal:
                _write_records(source, manifest, partial / EXPERT_FILE_NAME, checksums, journal, on_event)
            done = replace(manifest, checksums=tuple(checksums))
            done.write(partial)
            _sync_folder(partial)
            os.rename(partial, folder)
            (folder / JOURNAL_NAME).unlink()
            _sync_folder(folder.parent)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ExpertFileError(
                    f"{folder.parent}: the disk is full; free some space and run the same command again: it goes on "
                    "where it stopped"
                ) from error
            raise ExpertFileError(
                f"{error.filename or folder}: the pack cannot be written ({error.strerror})"
            ) from error
    return done


def _write_records(
    source: CheckpointSource,
    manifest: Manifest,
    path: Path,
    checksums: list[int],
    journal: TextIO,
    on_event: Callable[[LoadProgress], None],
) -> None:
    """Append the records that ``checksums`` does not have yet; extends ``checksums``, syncing after each layer."""
    weight_format = get_format(manifest.format)
    modules = {module.layer: module for module in source.experts}
    record = torch.zeros(manifest.slot_bytes, dtype=torch.uint8)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.ftruncate(fd, manifest.bytes_of(len(checksums)))
        on_event(LoadProgress("pack", manifest.bytes_of(len(checksums)), manifest.total_bytes, "bytes"))
        first = 0
        for layer in manifest.layers:
            layout = manifest.layouts[layer.layout]
            have = min(max(len(checksums) - first, 0), layer.experts)
            offset = layer.offset + have * layout.record_bytes
            new = []
            record.zero_()
            for expert in range(have, layer.experts):
                weight_format.encode(layout, source.read_expert(modules[layer.layer], expert), record)
                data = memoryview(record.numpy())[: layout.record_bytes]
                _write_all(fd, data, offset)
                new.append(zlib.crc32(data))
                offset += layout.record_bytes
                on_event(LoadProgress("pack", offset, manifest.total_bytes, "bytes"))
            if new:
                os.fdatasync(fd) if hasattr(os, "fdatasync") else os.fsync(fd)
                checksums += new
                append(journal, new)
                if hasattr(os, "posix_fadvise"):  # packing must not push everything else out of the page cache
                    os.posix_fadvise(fd, layer.offset, offset - layer.offset, os.POSIX_FADV_DONTNEED)
            first += layer.experts
        source.close()
    finally:
        os.close(fd)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _check_space(folder: Path, manifest: Manifest, records_done: int) -> None:
    needed = manifest.total_bytes - manifest.bytes_of(records_done) + _SPARE_BYTES
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise ExpertFileError(
            f"{folder.parent}: packing needs {format_size(needed)} but only {format_size(free)} are free; "
            "free some space or choose another disk with --experts-dir"
        )


def _sync_folder(folder: Path) -> None:
    """Make names in ``folder`` survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
