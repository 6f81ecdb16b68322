"""From a checkpoint to an expert file: streaming, resumable, atomic.

The pack grows in ``NAME.partial`` and is renamed when it is complete, so a folder without that suffix is whole. A
journal in it lists the checksums of the layers that are safely on disk: data is synced before its journal line is
written, so a resumed pack trusts exactly the journalled layers and writes the rest again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from offload.checkpoint.disk import check_space, disk_errors, sync_folder
from offload.checkpoint.fingerprint import checkpoint_fingerprint
from offload.checkpoint.formats import WeightFormat, get_format
from offload.checkpoint.journal import JOURNAL_NAME, PARTIAL_SUFFIX, PackedLayer, append, resumable, start_journal
from offload.checkpoint.lock import pack_lock
from offload.checkpoint.manifest import EXPERT_FILE_NAME, LayerLayout, Manifest, RecordLayout
from offload.checkpoint.records import RecordWriter, Tensors, read_ahead
from offload.checkpoint.source import CheckpointSource
from offload.compute.matrix import Error
from offload.errors import ModelError
from offload.events import LoadProgress
from offload.model.transformers_api import ExpertsModule


def plan_manifest(source: CheckpointSource, model: str, revision: str | None, format_name: str) -> Manifest:
    """The manifest that packing ``source`` will give, but for checksums (all 0) and errors (None). Reads no weights."""
    weight_format = get_format(format_name)
    layouts: list[RecordLayout] = []
    layers = []
    offset = 0
    for module in sorted(source.experts, key=lambda module: module.layer):
        layout = record_layout(source, module, weight_format)
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
        errors=(None,) * len(layers),
    )


def record_layout(source: CheckpointSource, module: ExpertsModule, weight_format: WeightFormat) -> RecordLayout:
    """The layout of the records of a layer. Raises ModelError if its experts cannot be kept as they are published."""
    specs = source.record_specs(module) if weight_format.published else module.tensors
    return weight_format.layout(specs, module.transposed)


def pack(
    source: CheckpointSource, manifest: Manifest, folder: Path, on_event: Callable[[LoadProgress], None]
) -> Manifest:
    """Write the pack that ``manifest`` plans into ``folder``, going on where an earlier try stopped.

    Returns the manifest with checksums and errors. Memory: a few experts. Raises ExpertFileError if another process
    packs there, the disk is too small (before anything is written) or a write fails (what is written is kept and
    resumed), and ModelError if a weight is damaged, or no number that the format can hold.
    """
    with pack_lock(folder):
        if (folder / EXPERT_FILE_NAME).exists():  # another process packed it a moment ago
            return Manifest.read(folder)
        partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
        layers = resumable(partial, manifest)
        with disk_errors(folder.parent, folder, ": it goes on where it stopped"):
            check_space(folder.parent, manifest.total_bytes - _bytes_of(manifest, len(layers)))
            partial.mkdir(exist_ok=True)
            with start_journal(partial, manifest, layers) as journal:
                _write_layers(source, manifest, partial / EXPERT_FILE_NAME, layers, journal, on_event)
            checksums = tuple(checksum for layer in layers for checksum in layer.checksums)
            done = replace(manifest, checksums=checksums, errors=tuple(layer.error for layer in layers))
            done.write(partial)
            sync_folder(partial)
            os.rename(partial, folder)
            (folder / JOURNAL_NAME).unlink()
            sync_folder(folder.parent)
    return done


def _write_layers(
    source: CheckpointSource,
    manifest: Manifest,
    path: Path,
    done: list[PackedLayer],
    journal: TextIO,
    on_event: Callable[[LoadProgress], None],
) -> None:
    """Append the layers that ``done`` does not have yet; extends ``done``, syncing after each layer."""
    modules = {module.layer: module for module in source.experts}
    layers = manifest.layers[len(done) :]
    order = [(modules[layer.layer], expert) for layer in layers for expert in range(layer.experts)]
    checksums: list[int] = []

    def written(end: int, checksum: int) -> None:
        checksums.append(checksum)
        on_event(LoadProgress("pack", end, manifest.total_bytes, "bytes"))

    published = get_format(manifest.format).published
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        start = _bytes_of(manifest, len(done))
        os.ftruncate(fd, start)
        on_event(LoadProgress("pack", start, manifest.total_bytes, "bytes"))
        with (
            closing(read_ahead(source, order, published)) as experts,
            RecordWriter(fd, manifest.slot_bytes, written) as writer,
        ):
            for layer in layers:
                error = _write_layer(source, manifest, layer, modules[layer.layer], experts, writer)
                os.fdatasync(fd) if hasattr(os, "fdatasync") else os.fsync(fd)
                done.append(PackedLayer(tuple(checksums), error))
                append(journal, done[-1].to_json())
                checksums.clear()
                if hasattr(os, "posix_fadvise"):  # packing must not push everything else out of the page cache
                    end = _bytes_of(manifest, len(done))
                    os.posix_fadvise(fd, layer.offset, end - layer.offset, os.POSIX_FADV_DONTNEED)
        source.close()
    finally:
        os.close(fd)


def _write_layer(
    source: CheckpointSource,
    manifest: Manifest,
    layer: LayerLayout,
    module: ExpertsModule,
    experts: Iterator[Tensors],
    writer: RecordWriter,
) -> float | None:
    """Encode and write the next ``layer.experts`` of ``experts``. All are written when it returns, with their error."""
    weight_format = get_format(manifest.format)
    layout = manifest.layouts[layer.layout]
    error = Error()
    for expert in range(layer.experts):
        tensors, record = next(experts), writer.buffer()
        lost = weight_format.encode(layout, tensors, record, module.transposed)
        if not lost.finite and weight_format.lossless:
            raise ModelError(
                f"{source.folder}: layer {layer.layer}, expert {expert} has scales that are not finite: the checkpoint "
                "is damaged; download it again"
            )
        if not lost.finite:
            raise ModelError(
                f"{source.folder}: layer {layer.layer}, expert {expert} has weights that are not finite (NaN, infinite "
                f"or too large), which --format {manifest.format} cannot hold; use --format native"
            )
        error = error.plus(lost)
        writer.write(layout.record_bytes, layer.offset + expert * layout.record_bytes)
    writer.finish()
    return None if weight_format.lossless else error.relative


def _bytes_of(manifest: Manifest, layers: int) -> int:
    """Size of the first ``layers`` layers of the expert file."""
    return manifest.layers[layers].offset if layers < len(manifest.layers) else manifest.total_bytes
