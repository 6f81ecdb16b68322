"""Checkpoint tensors in memory that is used again: the same tensors as ever, no copies, no more memory than said."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from offload.checkpoint.reading import KeepInPlace, Staging, TensorFiles
from offload.checkpoint.source import open_source
from offload.errors import ModelError
from tests.checkpoint.packs import tiny_source
from tests.tiny_models import TINY_ARCHITECTURES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int64)


def warm(staging: Staging, size: int) -> Staging:
    """With room for ``size`` bytes."""
    staging.take(size)
    staging.reset()
    return staging


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_experts_are_the_same_through_staging(architecture: str, tmp_path: Path) -> None:
    source = tiny_source(architecture, tmp_path)
    staging = Staging()
    for module in source.experts:
        for expert in range(module.num_experts):
            staging.reset()
            staged, plain = source.read_expert(module, expert, staging), source.read_expert(module, expert)
            assert staged.keys() == plain.keys()
            for name, tensor in plain.items():
                assert staged[name].dtype == tensor.dtype
                assert torch.equal(staged[name], tensor), (module.layer, expert, name)


@pytest.mark.parametrize("architecture", ["mixtral", "granitemoe", "qwen3_moe"])
def test_nothing_is_copied_on_the_way(architecture: str, tmp_path: Path) -> None:
    source = tiny_source(architecture, tmp_path)
    module, staging = source.experts[0], Staging()
    for expert in range(3):
        staging.reset()
        tensors = source.read_expert(module, expert, staging)
    memory = staging._memory
    for tensor in tensors.values():
        assert memory.data_ptr() <= tensor.data_ptr() < memory.data_ptr() + memory.nbytes
    assert staging.nbytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("architecture", ["mixtral", "granitemoe"])
def test_announcing_asks_for_what_is_read(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_source(architecture, tmp_path)
    asked: list[tuple[int, int]] = []
    dropped: list[tuple[int, int]] = []
    read: list[tuple[int, int]] = []
    lists = {os.POSIX_FADV_WILLNEED: asked, os.POSIX_FADV_DONTNEED: dropped}
    preadv = os.preadv

    def watched(fd: int, buffers: list[memoryview], at: int) -> int:
        read.append((at, len(buffers[0])))
        return preadv(fd, buffers, at)

    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, size, advice: lists[advice].append((at, size)))
    source.announce_expert(source.experts[1], 2)
    monkeypatch.setattr(os, "preadv", watched)
    source.read_expert(source.experts[1], 2, Staging())
    assert asked
    assert sorted(asked) == sorted(read) == sorted(dropped), "and does not stay in the page cache"


def test_staging_is_used_again() -> None:
    staging = Staging()
    first = [staging.take(100), staging.take(33), staging.take(64)]
    assert [len(piece) for piece in first] == [100, 33, 64]
    staging.reset()
    size = staging.nbytes
    second = [staging.take(100), staging.take(33), staging.take(64)]
    assert [piece.data_ptr() % 16 for piece in second] == [0, 0, 0]
    places = [piece.data_ptr() for piece in second]
    for piece in second:
        piece.fill_(1)
    staging.reset()
    assert [staging.take(100).data_ptr(), staging.take(33).data_ptr(), staging.take(64).data_ptr()] == places
    assert staging.nbytes == size == 112 + 48 + 64
    assert len(staging.take(10_000)) == 10_000, "more than there is room for"
    staging.reset()
    assert staging.nbytes >= 10_000


def test_all_dtypes_and_rows(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(35).view(5, 7).to(dtype) for dtype in DTYPES}
    tensors["scalar"] = torch.tensor(3.0)
    tensors["bool"] = torch.tensor([True, False])
    save_file(tensors, tmp_path / "a.safetensors")
    files = TensorFiles(dict.fromkeys(tensors, tmp_path / "a.safetensors"))
    staging = Staging()
    for _ in range(2):
        staging.reset()
        for dtype in DTYPES:
            for rows in (slice(None), slice(2, 3), slice(1, 5), slice(4, 9)):
                read = files.read(str(dtype), rows, staging)
                assert read is not None
                assert read.dtype == dtype
                assert torch.equal(read.float(), tensors[str(dtype)][rows].float())
    assert files.read("scalar", slice(None), staging) is None, "left to the library"
    assert files.read("bool", slice(None), staging) is None
    files.close()
    assert files.read(str(torch.int8), slice(None), staging) is not None, "opened again"
    files.close()


@pytest.mark.parametrize("damage", ["ends early", "no header", "not there", "other tensors"])
def test_damaged_files_are_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(100, 100)}, path)
    if damage == "ends early":
        os.truncate(path, 20_000)
    elif damage == "no header":
        path.write_bytes(b"\x10\0\0\0\0\0\0\0{")
    elif damage == "not there":
        path.unlink()
    else:
        header = json.dumps({"v": {}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
    files = TensorFiles({"w": path})
    files.announce("w", slice(None))
    with pytest.raises(
        ModelError, match=r"a.safetensors: tensor w cannot be read \(.*\); download the file again"
    ) as e:
        files.read("w", slice(None), Staging())
    assert "\n" not in str(e.value)
    files.close()


def test_expert_of_a_truncated_checkpoint(tmp_path: Path) -> None:
    source = open_source(tiny_source("mixtral", tmp_path).folder)
    for file in tmp_path.glob("*.safetensors"):
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ModelError, match="download the file again"):
        for module in source.experts:
            for expert in range(module.num_experts):
                source.announce_expert(module, expert)
                source.read_expert(module, expert, Staging())


def side_by_side(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Float32 tensors of these shapes, one behind the other in one memory."""
    staging = warm(Staging(), 100_000)
    made = []
    for number, shape in enumerate(shapes):
        size = 4 * torch.Size(shape).numel()
        made.append(staging.take(size).view(torch.float32).view(shape).fill_(number))
    return made


@pytest.mark.parametrize(
    ("shapes", "dim", "view"),
    [
        ([(4, 8), (4, 8)], 0, True),
        ([(4, 8), (12, 8), (1, 8)], 0, True),
        ([(1, 4, 8), (1, 4, 8)], 1, True),
        ([(1, 4, 8), (1, 4, 8)], -2, True),
        ([(4, 8), (4, 8)], 1, False),
        ([(2, 4, 8), (2, 4, 8)], 1, False),
        ([(3, 5), (3, 5)], 0, False),  # 60 bytes: there is a gap
    ],
)
def test_joining(shapes: list[tuple[int, ...]], dim: int, view: bool) -> None:
    tensors = side_by_side(*shapes)
    expected = torch.cat(tensors, dim=dim)
    with KeepInPlace():
        joined = torch.cat(tensors, dim=dim)
    assert torch.equal(joined, expected)
    assert joined.stride() == expected.stride()
    assert (joined.data_ptr() == tensors[0].data_ptr()) == view


def test_joining_copies_what_does_not_stand_side_by_side() -> None:
    one, two = side_by_side((4, 8), (4, 8))
    strided = torch.zeros(8, 4).t()
    for tensors in ([two, one], [one, one], [one, torch.zeros(4, 8)], [one, two.double()], [strided, strided]):
        expected = torch.cat(tensors)
        with KeepInPlace():
            joined = torch.cat(tensors)
        assert torch.equal(joined, expected)
        assert joined.data_ptr() != tensors[0].data_ptr()
    with KeepInPlace():
        stacked, both, plus = torch.stack([one], dim=0), torch.stack([one, two]), one + two
    assert (stacked.shape, stacked.data_ptr()) == ((1, 4, 8), one.data_ptr())
    assert both.shape == (2, 4, 8)
    assert torch.equal(plus, torch.ones(4, 8))
