"""Small packs for the tests of this folder, and ways to stop packing half-way and to look at it."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from offload.checkpoint.expert_file import ExpertFile
from offload.checkpoint.manifest import EXPERT_FILE_NAME, Manifest
from offload.checkpoint.pack import pack, plan_manifest
from offload.checkpoint.reading import Staging
from offload.checkpoint.source import CheckpointSource, open_source
from offload.events import LoadProgress, Notice
from tests.tiny_models import build_tiny, tiny_config


class Stopped(Exception):
    """What :func:`stop_after` raises."""


def ignore(event: LoadProgress | Notice) -> None:
    pass


def stop_after(size: int) -> Callable[[LoadProgress], None]:
    """An ``on_event`` that breaks packing off once ``size`` bytes are written."""

    def on_event(event: LoadProgress) -> None:
        if event.done >= size:
            raise Stopped

    return on_event


def tiny_source(model_type: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> CheckpointSource:
    return open_source(build_tiny(model_type, folder, dtype=dtype, seed=seed, tokenizer=False))


def big_checkpoint(folder: Path) -> Path:
    """A mixtral checkpoint of about 13 MB: 4 layers of 8 experts, 0.4 MB each."""
    config = tiny_config("mixtral")
    config.hidden_size, config.intermediate_size = 128, 256
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="3MB")
    return folder


def planned(source: CheckpointSource, format_name: str = "native") -> Manifest:
    return plan_manifest(source, "tiny", None, format_name)


def write_pack(
    source: CheckpointSource,
    folder: Path,
    on_event: Callable[[LoadProgress], None] = ignore,
    format_name: str = "native",
) -> tuple[Manifest, bytes]:
    """Pack ``source``; returns the manifest and the expert file's content."""
    return pack(source, planned(source, format_name), folder, on_event), (folder / EXPERT_FILE_NAME).read_bytes()


def aligned_buffer(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size))


def partial_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def watch_reads(source: CheckpointSource, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Collects (layer, expert) of every expert that is read from now on."""
    seen: list[tuple[int, int]] = []
    name = "read_expert" if source.method is None else "read_published"
    read = getattr(source, name)

    def watched(module: Any, expert: int, staging: Staging | None = None) -> Any:
        seen.append((module.layer, expert))
        return read(module, expert, staging)

    monkeypatch.setattr(source, name, watched)
    return seen


def stopped_pack(checkpoint: Path, folder: Path, layers: float, format_name: str = "native") -> CheckpointSource:
    """A pack that was broken off after ``layers`` layers."""
    source = open_source(checkpoint)
    layer_bytes = planned(source, format_name).layers[1].offset
    with pytest.raises(Stopped):
        write_pack(source, folder, stop_after(int(layers * layer_bytes) + 1), format_name)
    return source


def resumed_layers(
    source: CheckpointSource, folder: Path, monkeypatch: pytest.MonkeyPatch, format_name: str = "native"
) -> list[int]:
    """Go on, check the result against a pack made in one go, and return the layers that were read."""
    with monkeypatch.context() as patch:
        reads = watch_reads(source, patch)
        manifest, data = write_pack(source, folder, format_name=format_name)
    in_one_go = write_pack(open_source(source.folder), folder.with_name("in one go"), format_name=format_name)
    assert (manifest, data) == in_one_go
    with ExpertFile(folder) as file:
        file.verify(lambda event: None)
    return sorted({layer for layer, _ in reads})
