"""Packing: the records are the stock model's weights bit for bit, little memory is used, and whatever the disk does is
said in one line and leaves nothing that looks whole and is not.
"""

from __future__ import annotations

import errno
import os
import shutil
import weakref
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache.keys import ExpertKey
from offload.checkpoint import pack as pack_module
from offload.checkpoint.disk import SPARE_BYTES
from offload.checkpoint.expert_file import ExpertFile
from offload.checkpoint.formats import get_format
from offload.checkpoint.library import list_packs
from offload.checkpoint.manifest import EXPERT_FILE_NAME, MANIFEST_NAME
from offload.checkpoint.reading import Staging
from offload.checkpoint.source import open_source
from offload.errors import ExpertFileError, ModelError, RunLocalError
from offload.events import LoadProgress
from tests.checkpoint.packs import (
    aligned_buffer,
    partial_of,
    planned,
    resumed_layers,
    stopped_pack,
    tiny_source,
    watch_reads,
    write_pack,
)
from tests.tiny_models import load_reference

# What they differ in: tensors of each expert; fused; fused, transposed, interleaved, with biases; fused and transposed;
# no gate; a vision tower beside; dense layers between; ids beyond the last expert; own names.
LAYOUTS = ("mixtral", "granitemoe", "gpt_oss", "aria_text", "nemotron_h", "qwen3_5_moe", "jamba", "zaya")
LAYOUTS += ("deepseek_v3", "ernie4_5_moe", "deepseek_v4")


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [(name, torch.float32) for name in LAYOUTS] + [(name, torch.bfloat16) for name in LAYOUTS[:5]],
)
def test_records_are_the_stock_models_weights(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny_source(model_type, tmp_path / "model", dtype=dtype)
    write_pack(source, tmp_path / "pack")
    stock = dict(load_reference(tmp_path / "model").named_parameters())
    with ExpertFile(tmp_path / "pack") as file:
        buffer = aligned_buffer(file.manifest.slot_bytes)
        record = torch.frombuffer(buffer, dtype=torch.uint8)
        compared = 0
        for layer in file.manifest.layers:
            prefix = next(n for n in (layer.path, f"model.{layer.path}") if any(k.startswith(n + ".") for k in stock))
            for expert in range(layer.experts):
                file.read_into(ExpertKey(layer.layer, expert), buffer)
                for name, tensor in get_format("native").views(file.layout(layer.layer), record).items():
                    expected = stock[f"{prefix}.{name}"][expert]
                    assert tensor.dtype == expected.dtype
                    assert torch.equal(tensor, expected), (layer.layer, expert, name)
                    compared += tensor.numel()
    owned = sum(p.numel() for k, p in stock.items() if k.rpartition(".")[0].endswith(".experts") and p.ndim > 1)
    assert compared == owned, "every expert weight stands in a record, once"


def test_padding_is_zero_and_the_file_is_the_same_each_time(tmp_path: Path) -> None:
    checkpoint = tiny_source("gpt_oss", tmp_path / "model").folder  # its biases leave room at the end of a record
    manifest, first = write_pack(open_source(checkpoint), tmp_path / "one")
    again, second = write_pack(open_source(checkpoint), tmp_path / "two")
    assert first == second
    assert again == manifest
    assert len(first) == manifest.total_bytes == manifest.num_records * manifest.slot_bytes
    used = max(tensor.offset + tensor.bytes for tensor in manifest.layouts[0].tensors)
    assert used < manifest.slot_bytes
    for start in range(0, len(first), manifest.slot_bytes):
        assert not any(first[start + used : start + manifest.slot_bytes])
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == [EXPERT_FILE_NAME, MANIFEST_NAME]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "one", "two"]


@pytest.mark.parametrize("model_type", ["mixtral", "granitemoe", "gpt_oss"])
def test_only_a_few_experts_are_in_memory(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_source(model_type, tmp_path / "model")
    live, most = 0, 0
    read = source._stage

    def freed(size: int) -> None:
        nonlocal live
        live -= size

    def counted(staging: Staging, key: str, rows: slice) -> torch.Tensor:
        """The same tensor on memory that says when it is given back, whatever views are left of it."""
        nonlocal live, most
        tensor = read(staging, key, rows)
        memory = np.empty(tensor.numel() * tensor.element_size(), dtype=np.uint8)
        live += memory.nbytes
        most = max(most, live)
        weakref.finalize(memory, freed, memory.nbytes)
        return torch.from_numpy(memory).view(tensor.dtype).view(tensor.shape).copy_(tensor)

    monkeypatch.setattr(source, "_stage", counted)
    manifest, _ = write_pack(source, tmp_path / "pack")
    assert 0 < most <= 3 * manifest.slot_bytes, "one that is encoded, one that is read, and parts of it"
    assert live <= manifest.slot_bytes


def test_progress_rises_to_the_total(checkpoint: Path, tmp_path: Path) -> None:
    events: list[LoadProgress] = []
    manifest, _ = write_pack(open_source(checkpoint), tmp_path / "pack", events.append)
    done = [event.done for event in events]
    assert done == sorted(set(done))
    assert (done[0], done[-1]) == (0, manifest.total_bytes)
    assert {(event.stage, event.total, event.unit) for event in events} == {("pack", manifest.total_bytes, "bytes")}
    assert len(done) == manifest.num_records + 1


def test_nothing_looks_whole_before_the_end(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "packs" / "pack"

    def look(event: LoadProgress | None = None) -> None:
        assert not folder.exists()
        assert not any(pack.complete for pack in list_packs(folder.parent))

    rename = os.rename

    def look_and_rename(old: Any, new: Any) -> None:
        look()
        assert (old / MANIFEST_NAME).exists()
        rename(old, new)

    monkeypatch.setattr(os, "rename", look_and_rename)
    write_pack(open_source(checkpoint), folder, look)
    (found,) = list_packs(folder.parent)
    assert found.complete


# --- the disk -------------------------------------------------------------------------------------------------------


def test_full_disk_is_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**20, 2**20))
    source = open_source(checkpoint)
    reads = watch_reads(source, monkeypatch)
    with pytest.raises(ExpertFileError, match=r"packing needs 65.* MiB but only 1.0 MiB are free; .* --experts-dir"):
        write_pack(source, tmp_path / "packs" / "pack")
    assert not reads
    assert not list((tmp_path / "packs").iterdir())


def test_resuming_asks_only_for_what_is_missing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pack"
    source = stopped_pack(checkpoint, folder, 3.5)
    wanted = planned(source)
    usage = namedtuple("usage", "total used free")
    free = wanted.total_bytes // 4 + SPARE_BYTES
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, free - 1))
        with pytest.raises(ExpertFileError, match="packing needs"):
            write_pack(source, folder)
        patch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, free))
        write_pack(source, folder)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk is full; free some space and run the same command again"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EIO, "the pack cannot be written \\(Input/output error\\)"),
        (errno.EROFS, "the pack cannot be written \\(Read-only file system\\)"),
    ],
)
def test_failing_write_is_one_line_and_resumable(
    code: int, message: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pack"
    source = open_source(checkpoint)
    pwrite, calls = os.pwrite, 0

    def failing(fd: int, data: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(code, os.strerror(code))
        return pwrite(fd, data[: len(data) // 2 + 1], offset)  # a write may also be short

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        with pytest.raises(ExpertFileError, match=message) as caught:
            write_pack(source, folder)
    assert "\n" not in str(caught.value)
    assert not folder.exists()
    assert resumed_layers(source, folder, monkeypatch)[-1] == 3
    assert not partial_of(folder).exists()


def test_full_disk_while_the_journal_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(journal: Any, value: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = tmp_path / "pack"
    source = open_source(checkpoint)
    with monkeypatch.context() as patch, pytest.raises(ExpertFileError, match="the disk is full"):
        patch.setattr(pack_module, "append", full)
        write_pack(source, folder)
    assert resumed_layers(source, folder, monkeypatch) == [0, 1, 2, 3]


def test_folder_that_cannot_be_written(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(checkpoint)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RunLocalError, match=r"cannot be written \(.*\); choose another folder with --experts-dir"):
        write_pack(source, tmp_path / "file" / "pack")

    def read_only(path: Any, *arguments: Any, **named: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "mkdir", read_only)
    with pytest.raises(RunLocalError, match=r"cannot be written \(Read-only file system\)"):
        write_pack(source, tmp_path / "new" / "pack")


def test_folder_without_write_permission(checkpoint: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    with pytest.raises(RunLocalError, match=r"cannot be written \(Permission denied\)"):
        write_pack(open_source(checkpoint), folder / "pack")


def test_checkpoint_that_ends_while_it_is_read(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    source = open_source(copy)
    wanted = planned(source)
    for file in copy.glob("*.safetensors"):
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ModelError, match=r"download (it|the file) again") as caught:
        pack_module.pack(source, wanted, tmp_path / "pack", lambda event: None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pack").exists()
