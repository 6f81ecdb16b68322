"""Packing that was broken off, by kill -9 as well, goes on where it stopped: what the journal names is trusted, the
rest is read again, and the file is the one that packing in one go gives.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload.checkpoint.expert_file import ExpertFile
from offload.checkpoint.journal import JOURNAL_NAME, resumable
from offload.checkpoint.library import ensure_pack, list_packs, pack_name
from offload.checkpoint.manifest import EXPERT_FILE_NAME
from offload.checkpoint.pack import plan_manifest
from offload.checkpoint.source import open_source
from offload.errors import ExpertFileError
from tests.checkpoint.packs import (
    Stopped,
    big_checkpoint,
    partial_of,
    planned,
    resumed_layers,
    stopped_pack,
    tiny_source,
    watch_reads,
    write_pack,
)

ROOT = Path(__file__).resolve().parents[2]


# What a user runs, but it stops and waits in the third of four layers, so that it can be met there.
STUCK_PACK = """
import sys, time
from pathlib import Path
from offload.checkpoint import records
from offload.checkpoint.library import pack_model
from offload.config import EngineSettings

write, written = records.write_all, []
def stuck(*arguments):
    if len(written) == 20:
        time.sleep(600)
    written.append(1)
    write(*arguments)
records.write_all = stuck
report = lambda event: print(getattr(event, "done", 0), flush=True)
pack_model(EngineSettings(model=sys.argv[1], experts_dir=Path(sys.argv[2])), report)
"""


def test_kill_9_and_a_second_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = big_checkpoint(tmp_path / "model")
    source = open_source(model)
    wanted = plan_manifest(source, "model", None, "native")
    layer_bytes = wanted.layers[1].offset
    root = tmp_path / "packs"
    child = subprocess.Popen(
        [sys.executable, "-c", STUCK_PACK, str(model), str(root)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) == 2 * layer_bytes + layer_bytes // 2:
                break
        with pytest.raises(ExpertFileError, match="another process is packing this model now"):
            ensure_pack(source, "model", None, "native", root, lambda event: None)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert child.returncode == -signal.SIGKILL

    folder = root / pack_name(wanted)
    assert not folder.exists()
    assert folder.with_name(folder.name + ".lock").exists(), "stale, and must not be in the way"
    (found,) = list_packs(root)
    assert (found.name, found.complete) == (folder.name + ".partial", False)
    assert found.bytes >= 2 * layer_bytes

    events: list[int] = []
    reads = watch_reads(source, monkeypatch)
    ensure_pack(source, "model", None, "native", root, lambda event: events.append(getattr(event, "done", 0)))
    assert reads == [(layer, expert) for layer in (2, 3) for expert in range(8)]
    assert events[1] == 2 * layer_bytes
    assert sorted(path.name for path in root.iterdir()) == [folder.name]

    _, in_one_go = write_pack(open_source(model), tmp_path / "other")
    assert (folder / EXPERT_FILE_NAME).read_bytes() == in_one_go
    with ExpertFile(folder) as file:
        file.verify(lambda event: None)


@pytest.mark.parametrize("again", [False, True])
def test_torn_journal_line(again: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pack"
    source = stopped_pack(checkpoint, folder, 1.5)
    journal = partial_of(folder) / JOURNAL_NAME
    journal.write_text(journal.read_text() + "[123, 4")
    if again:  # what goes on behind the torn line may be broken off too
        stopped_pack(checkpoint, folder, 2.5)
        journal.write_text(journal.read_text() + "[")
    assert resumed_layers(source, folder, monkeypatch) == ([2, 3] if again else [1, 2, 3])


def test_stopped_while_the_journal_is_renewed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pack"
    source = stopped_pack(checkpoint, folder, 1.5)
    (partial_of(folder) / f"{JOURNAL_NAME}.new").write_text('{"half": ')
    stopped_pack(checkpoint, folder, 2.5)
    assert resumed_layers(source, folder, monkeypatch) == [2, 3]


@pytest.mark.parametrize(
    "lines",
    [
        "",
        "{",
        "5\n",
        "null\n",
        "[1, 2]\n",
        '{"checksums": [1, 2, 3, 4, 5, 6, 7, "8"], "error": null}\n',
        '{"checksums": [1, 2, 3, 4, 5, 6, 7, 8], "error": "0"}\n',
        '{"checksums": [1, 2, 3, 4, 5, 6, 7, 8]}\n',
        '{"checksums": [1, 2, 3], "error": null}\n',
        '{"checksums": [1, 2, 3, 4, 5, 6, 7, 8], "error": null}\n' * 5,
        "\udcff\n",
        '{"checksums": [1,\n{"checksums": [1, 2, 3, 4, 5, 6, 7, 8], "error": null}\n',
    ],
    ids=[
        "empty",
        "torn",
        "number",
        "null",
        "list",
        "text",
        "error is text",
        "no error",
        "part of a layer",
        "too many",
        "no UTF-8",
        "damaged in the middle",
    ],
)
def test_damaged_journal_means_starting_over(
    lines: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pack"
    source = stopped_pack(checkpoint, folder, 1.5)
    journal = partial_of(folder) / JOURNAL_NAME
    head = journal.read_text().splitlines()[0] + "\n" if lines else ""
    os.truncate(partial_of(folder) / EXPERT_FILE_NAME, planned(source).total_bytes)  # its length gives no hint
    journal.write_bytes((head + lines).encode(errors="surrogateescape"))
    assert resumed_layers(source, folder, monkeypatch) == [0, 1, 2, 3]


def test_expert_file_shorter_than_the_journal_says(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pack"
    source = stopped_pack(checkpoint, folder, 2.5)
    os.truncate(partial_of(folder) / EXPERT_FILE_NAME, 4096)
    assert resumed_layers(source, folder, monkeypatch) == [0, 1, 2, 3]


def test_stray_expert_file_without_a_journal(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pack"
    partial_of(folder).mkdir()
    (partial_of(folder) / EXPERT_FILE_NAME).write_bytes(b"x" * 10_000_000)  # longer than the pack will be
    assert resumed_layers(open_source(checkpoint), folder, monkeypatch) == [0, 1, 2, 3]


def test_partial_pack_of_another_checkpoint(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pack"
    stopped_pack(tiny_source("mixtral", tmp_path / "other", seed=1).folder, folder, 2.5)
    assert resumed_layers(open_source(checkpoint), folder, monkeypatch) == [0, 1, 2, 3]


@pytest.mark.parametrize("field", ["format_version", "format", "fingerprint", "layouts"])
def test_partial_pack_of_another_version(field: str, checkpoint: Path, tmp_path: Path) -> None:
    partial = partial_of(tmp_path / "pack")
    wanted = planned(stopped_pack(checkpoint, tmp_path / "pack", 2.5))
    assert len(resumable(partial, wanted)) == 2
    larger = tuple(replace(layout, record_bytes=layout.record_bytes + 4096) for layout in wanted.layouts)
    changed: Any = {"format_version": 3, "format": "int4", "fingerprint": "0" * 16, "layouts": larger}[field]
    assert resumable(partial, replace(wanted, **{field: changed})) == []
    assert not partial.exists(), "it is thrown away"


def test_stopped_between_the_last_record_and_the_rename(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pack"
    source = open_source(checkpoint)

    def stop(old: Any, new: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(os, "rename", stop)
        write_pack(source, folder)
    assert resumed_layers(source, folder, monkeypatch) == []
