"""The packing pipeline: reading, encoding and writing overlap, little is in memory, and however it ends, its threads
end with it and what was on disk is used again.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from offload.checkpoint import records
from offload.checkpoint.formats import get_format
from offload.checkpoint.library import list_packs
from offload.checkpoint.records import RecordWriter, read_ahead
from offload.checkpoint.source import open_source
from offload.compute.matrix import QuantizedMatrix, decode
from offload.errors import ExpertFileError, ModelError
from offload.events import LoadProgress
from tests.checkpoint.packs import (
    Stopped,
    big_checkpoint,
    partial_of,
    planned,
    resumed_layers,
    stop_after,
    stopped_pack,
    watch_reads,
    write_pack,
)

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 10.0


def pack_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pack-")]


def test_the_stages_overlap(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While an expert is encoded the next is read and the one before is written: encoding waits for both here."""
    source = open_source(checkpoint)
    reads = watch_reads(source, monkeypatch)
    native = get_format("native")
    encode, write_all = type(native).encode, records.write_all
    changed = threading.Condition()
    encoded = written = 0

    def wait_for(what: Any) -> None:
        with changed:
            assert changed.wait_for(what, WAIT_S)

    def encoding(*arguments: Any) -> Any:
        nonlocal encoded
        number = encoded
        wait_for(lambda: len(reads) >= min(number + 2, 32) and written >= number)
        assert len(reads) <= number + 2, "not further ahead: two experts are in memory"
        encoded += 1
        return encode(native, *arguments)

    def writing(*arguments: Any) -> None:
        nonlocal written
        write_all(*arguments)
        with changed:
            written += 1
            changed.notify_all()

    read = source.read_expert

    def reading(*arguments: Any) -> Any:
        tensors = read(*arguments)
        with changed:
            changed.notify_all()
        return tensors

    monkeypatch.setattr(source, "read_expert", reading)
    monkeypatch.setattr(native, "encode", encoding)
    monkeypatch.setattr(records, "write_all", writing)
    manifest, data = write_pack(source, tmp_path / "pack")
    monkeypatch.undo()
    assert (manifest, data) == write_pack(open_source(checkpoint), tmp_path / "other")
    assert not pack_threads()


@pytest.mark.parametrize("stage", ["read", "encode", "write", "report"])
@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt])
def test_an_error_anywhere_comes_out_once_and_packing_goes_on_later(
    stage: str, error: type[BaseException], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(checkpoint)
    int8 = get_format("int8")
    calls = 0

    def failing(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 20:
                raise error("the twentieth")
            assert calls < 24, "nothing much happens after the error"
            return real(*arguments)

        return call

    def ignore(event: LoadProgress) -> None:
        pass

    report = ignore
    with monkeypatch.context() as patch:
        if stage == "read":
            patch.setattr(source, "read_expert", failing(source.read_expert))
        elif stage == "encode":
            patch.setattr(int8, "encode", failing(int8.encode))
        elif stage == "write":
            patch.setattr(records, "write_all", failing(records.write_all))
        else:
            report = failing(ignore)
        with pytest.raises(error, match="the twentieth"):
            write_pack(source, tmp_path / "pack", report, "int8")
    assert not pack_threads()
    assert not (tmp_path / "pack").exists()
    layers = resumed_layers(source, tmp_path / "pack", monkeypatch, "int8")
    assert layers == [2, 3], "two of four layers were on the disk"


def test_a_full_disk_is_said_once_and_ends_the_threads(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(ExpertFileError, match="the disk is full"):
        patch.setattr(records, "write_all", full)
        write_pack(open_source(checkpoint), tmp_path / "pack")
    assert not pack_threads()


# An ordinary pack, but each record takes a while; Ctrl-C reaches it as it does at a terminal.
SLOW_PACK = """
import sys, time
from offload.checkpoint import records
import run_local

write = records.write_all
def slow(*arguments):
    write(*arguments)
    print("written", flush=True)
    time.sleep(0.05)
records.write_all = slow
sys.exit(run_local.main(["pack", "--offline", "--model", sys.argv[1], "--format", "int8", "-o", sys.argv[2]]))
"""


def test_control_c_leaves_what_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = big_checkpoint(tmp_path / "model"), tmp_path / "packs" / "pack"
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW_PACK, str(model), str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    for _ in range(20):  # the third layer of four, with eight experts each
        assert child.stdout.readline() == "written\n"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert "Traceback" not in errors
    assert [pack.complete for pack in list_packs(folder.parent)] == [False]
    assert resumed_layers(open_source(model), folder, monkeypatch, "int8") == [2, 3]
    assert not partial_of(folder).exists()


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_name", ["int8", "int4", "mixed"])
def test_the_file_does_not_depend_on_threads_or_breaks(
    format_name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        manifest, data = write_pack(open_source(checkpoint), tmp_path / "three", format_name=format_name)
    finally:
        torch.set_num_threads(threads)
    assert len(manifest.errors) == 4
    assert all(error is not None and 0 < error < 0.1 for error in manifest.errors)
    source = stopped_pack(checkpoint, tmp_path / "pack", 2.5, format_name)
    assert resumed_layers(source, tmp_path / "pack", monkeypatch, format_name) == [2, 3]
    assert write_pack(source, tmp_path / "one", format_name=format_name) == (manifest, data)


def test_errors_are_those_of_the_records(checkpoint: Path, tmp_path: Path) -> None:
    source = open_source(checkpoint)
    manifest, data = write_pack(source, tmp_path / "pack", format_name="int4")
    weight_format = get_format("int4")
    record_bytes = manifest.slot_bytes
    for layer, module, error in zip(manifest.layers, source.experts, manifest.errors, strict=True):
        lost = weights = 0.0
        for expert in range(layer.experts):
            start = layer.offset + expert * record_bytes
            record = torch.frombuffer(bytearray(data[start : start + record_bytes]), dtype=torch.uint8)
            views = weight_format.views(manifest.layouts[layer.layout], record)
            for name, exact in source.read_expert(module, expert).items():
                decoded = decode(cast(QuantizedMatrix, views[name]), torch.float32, None)
                lost += (decoded.double() - exact.double()).square().sum().item()
                weights += exact.double().square().sum().item()
        assert error == pytest.approx((lost / weights) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("format_name", ["int8", "int4", "mixed"])
def test_weights_that_are_no_numbers_are_refused(
    format_name: str, value: float, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(checkpoint)
    read = source.read_expert

    def damaged(module: Any, expert: int, *staging: Any) -> dict[str, torch.Tensor]:
        tensors = read(module, expert, *staging)
        if (module.layer, expert) == (2, 5):
            tensors["down_proj"][7, 11] = value
        return tensors

    monkeypatch.setattr(source, "read_expert", damaged)
    with pytest.raises(ModelError, match=f"layer 2, expert 5 has weights .* --format {format_name} .* --format native"):
        write_pack(source, tmp_path / "pack", format_name=format_name)
    assert not pack_threads()
    write_pack(source, tmp_path / "native")


# --- the parts ------------------------------------------------------------------------------------------------------


def test_read_ahead_gives_all_in_order_and_can_be_left(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(checkpoint)
    order = [(module, expert) for module in source.experts[:2] for expert in range(module.num_experts)]
    for (module, expert), tensors in zip(order, read_ahead(source, order), strict=True):
        for name, exact in source.read_expert(module, expert).items():
            assert torch.equal(tensors[name], exact)
    assert list(read_ahead(source, [])) == []
    left = read_ahead(source, order)
    next(left)
    assert pack_threads()
    left.close()
    assert not pack_threads()


def test_writer_reports_in_order_with_checksums(tmp_path: Path) -> None:
    path, seen = tmp_path / "file", []
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    with RecordWriter(fd, 8192, lambda end, checksum: seen.append((end, checksum))) as writer:
        for number in range(7):
            writer.buffer()[:4096].fill_(number)
            writer.write(4096, number * 4096)
        writer.finish()
        assert not writer.buffer().any(), "nothing of these records gets into the padding of others"
    os.close(fd)
    data = path.read_bytes()
    assert seen == [(n * 4096 + 4096, zlib.crc32(data[n * 4096 : n * 4096 + 4096])) for n in range(7)]
    assert data == b"".join(bytes([number]) * 4096 for number in range(7))


def test_stop_after_counts_what_is_written(checkpoint: Path, tmp_path: Path) -> None:
    wanted = planned(open_source(checkpoint))
    with pytest.raises(Stopped):
        write_pack(open_source(checkpoint), tmp_path / "pack", stop_after(wanted.slot_bytes))
    assert (partial_of(tmp_path / "pack") / "experts.bin").stat().st_size >= wanted.slot_bytes
