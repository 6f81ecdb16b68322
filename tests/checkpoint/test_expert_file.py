"""Records come back as they stand in the file, however the system reads them, and whatever is wrong is said in a line
with the file, the record and the remedy.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cache.keys import ExpertKey
from offload.checkpoint.expert_file import ExpertFile
from offload.checkpoint.manifest import EXPERT_FILE_NAME, MANIFEST_NAME, Manifest
from offload.errors import ExpertFileError
from offload.events import LoadProgress
from tests.checkpoint.packs import aligned_buffer

KEYS = [ExpertKey(layer, expert) for layer in range(4) for expert in range(8)]


def read_all(file: ExpertFile) -> bytes:
    buffer = aligned_buffer(file.manifest.slot_bytes)
    return b"".join(bytes(buffer[: file.read_into(key, buffer)]) for key in KEYS)


def refused(action: Callable[[], object], match: str) -> None:
    with pytest.raises(ExpertFileError, match=match) as caught:
        action()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("direct", [True, False])
def test_reads_equal_the_file(direct: bool, packed: Path) -> None:
    with ExpertFile(packed, direct=direct) as file:
        assert direct or not file.direct
        assert (file.fallback_notice() is None) == file.direct
        assert read_all(file) == (packed / EXPERT_FILE_NAME).read_bytes()


def test_larger_buffers_keep_their_end(packed: Path) -> None:
    with ExpertFile(packed) as file:
        buffer = aligned_buffer(file.manifest.slot_bytes + 4096)
        buffer[-4096:] = b"\xab" * 4096
        assert file.read_into(KEYS[5], buffer) == file.manifest.slot_bytes
        assert buffer[-4096:] == b"\xab" * 4096


def test_file_system_that_refuses_o_direct_when_opening(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system_open = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return system_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with ExpertFile(packed) as file:
        assert not file.direct
        assert "has no O_DIRECT" in (file.fallback_notice() or "")
        assert "page cache" in (file.fallback_notice() or "")
        assert read_all(file) == (packed / EXPERT_FILE_NAME).read_bytes()


def test_file_system_that_refuses_o_direct_when_reading(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system_preadv = os.preadv
    refusing = True

    def refuse(*arguments: Any) -> int:
        if refusing:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return system_preadv(*arguments)

    monkeypatch.setattr(os, "preadv", refuse)
    with ExpertFile(packed) as file:
        refusing = False
        assert not file.direct
        assert read_all(file) == (packed / EXPERT_FILE_NAME).read_bytes()


def test_system_without_o_direct(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    with ExpertFile(packed) as file:
        assert not file.direct
        assert read_all(file) == (packed / EXPERT_FILE_NAME).read_bytes()


# --- reads that end early or fail -----------------------------------------------------------------------------------


def short_reads(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """``preadv`` gives at most ``most`` bytes at a time, and refuses what O_DIRECT would refuse."""
    system_preadv = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0):
            assert offset % 4096 == 0, "O_DIRECT reads whole blocks"
        # a whole block is read even if fewer bytes are told, as the real call would fill the memory
        return min(system_preadv(fd, buffers, offset), most)

    monkeypatch.setattr(os, "preadv", short)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("most", [4096, 8192, 5000, 12289])
def test_short_reads(most: int, direct: bool, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExpertFile(packed, direct=direct) as file:
        short_reads(monkeypatch, most)
        assert read_all(file) == (packed / EXPERT_FILE_NAME).read_bytes()


def test_tiny_reads(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than a block at a time: buffered reads go on, O_DIRECT cannot, and says so instead of trying for ever."""
    with ExpertFile(packed, direct=False) as file:
        short_reads(monkeypatch, 1000)
        assert read_all(file) == (packed / EXPERT_FILE_NAME).read_bytes()
    monkeypatch.undo()
    with ExpertFile(packed) as file:
        if not file.direct:
            pytest.skip("no O_DIRECT here")
        short_reads(monkeypatch, 1000)
        refused(lambda: read_all(file), "the file ends inside the record of layer 0, expert 0")


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("cut", [4096, 4000, 1])
def test_file_truncated_while_it_is_open(cut: int, direct: bool, packed: Path) -> None:
    with ExpertFile(packed, direct=direct) as file:
        path = packed / EXPERT_FILE_NAME
        os.truncate(path, path.stat().st_size - cut)
        buffer = aligned_buffer(file.manifest.slot_bytes)
        file.read_into(KEYS[-2], buffer)
        refused(
            lambda: file.read_into(KEYS[-1], buffer),
            rf"{EXPERT_FILE_NAME}: the file ends inside the record of layer 3, expert 7; remove the pack .* again",
        )


@pytest.mark.parametrize("code", [errno.EIO, errno.ENODEV, errno.ESTALE])
def test_read_error(code: int, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExpertFile(packed) as file:

        def fail(*arguments: Any) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "preadv", fail)
        refused(
            lambda: file.read_into(ExpertKey(2, 5), aligned_buffer(file.manifest.slot_bytes)),
            rf"{EXPERT_FILE_NAME}: reading the record of layer 2, expert 5 failed \({os.strerror(code)}\); check",
        )


@pytest.mark.parametrize("key", [ExpertKey(0, 8), ExpertKey(0, -1), ExpertKey(3, 8), ExpertKey(4, 0), ExpertKey(-1, 0)])
def test_record_that_does_not_exist(key: ExpertKey, packed: Path) -> None:
    """An expert beyond the last one must not give the next layer's first."""
    with ExpertFile(packed) as file:
        refused(
            lambda: file.read_into(key, aligned_buffer(file.manifest.slot_bytes)),
            f"there is no record of layer {key.layer}, expert {key.expert}",
        )


def test_closed_file(packed: Path) -> None:
    file = ExpertFile(packed)
    file.close()
    file.close()
    refused(lambda: file.read_into(KEYS[0], aligned_buffer(file.manifest.slot_bytes)), "Bad file descriptor")


@pytest.mark.parametrize("direct", [True, False])
def test_many_threads(direct: bool, packed: Path) -> None:
    content = (packed / EXPERT_FILE_NAME).read_bytes()
    with ExpertFile(packed, direct=direct) as file, ThreadPoolExecutor(8) as pool:
        size = file.manifest.slot_bytes

        def read(number: int) -> bool:
            buffer = aligned_buffer(size)
            file.read_into(KEYS[number], buffer)
            return bytes(buffer) == content[number * size : (number + 1) * size]

        assert all(pool.map(read, [(7 * n) % len(KEYS) for n in range(400)]))


# --- opening --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [-4096, -1, 1, 4096])
def test_file_of_another_length(change: int, packed: Path) -> None:
    path = packed / EXPERT_FILE_NAME
    size = path.stat().st_size
    os.truncate(path, size + change)
    refused(
        lambda: ExpertFile(packed),
        rf"{EXPERT_FILE_NAME}: the file has {size + change} bytes instead of {size} .*; remove the pack",
    )


def test_missing_file(packed: Path) -> None:
    (packed / EXPERT_FILE_NAME).unlink()
    refused(
        lambda: ExpertFile(packed), rf"{EXPERT_FILE_NAME}: cannot be opened \(No such file .*--remove {packed.name}\)"
    )


def test_folder_without_a_pack(tmp_path: Path) -> None:
    refused(lambda: ExpertFile(tmp_path), "there is no pack here")


def test_manifest_of_another_version(packed: Path) -> None:
    path = packed / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    refused(lambda: ExpertFile(packed), "manifest version 99, this one reads 1")


def test_record_bounds_outside_the_file(packed: Path) -> None:
    """A manifest that is sound in itself and tells of more than the file holds."""
    path = packed / MANIFEST_NAME
    data = json.loads(path.read_text())
    data["layers"][-1]["experts"] += 1
    data["checksums"].append(0)
    path.write_text(json.dumps(data))
    Manifest.read(packed)
    refused(lambda: ExpertFile(packed), r"truncated or overwritten")


# --- checksums ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False])
def test_verify_passes_and_reports(direct: bool, packed: Path) -> None:
    events: list[LoadProgress] = []
    with ExpertFile(packed, direct=direct) as file:
        file.verify(events.append)
        size, total = file.manifest.slot_bytes, file.manifest.total_bytes
    assert events == [LoadProgress("verify", n * size, total, "bytes") for n in range(1, len(KEYS) + 1)]


@pytest.mark.parametrize(("number", "place"), [(0, 0), (13, 2000), (31, -1)])
def test_verify_finds_one_flipped_bit(number: int, place: int, packed: Path) -> None:
    path = packed / EXPERT_FILE_NAME
    content = bytearray(path.read_bytes())
    size = len(content) // len(KEYS)
    content[number * size + place % size] ^= 0x10
    path.write_bytes(content)
    with ExpertFile(packed) as file:
        refused(
            lambda: file.verify(lambda event: None),
            rf"the record of layer {number // 8}, expert {number % 8} is damaged .*remove the pack",
        )
