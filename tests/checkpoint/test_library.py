"""Packs on disk: each checkpoint has its own name, all are listed with what they take, and removing one removes that
one and nothing else.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from offload.checkpoint.expert_file import ExpertFile
from offload.checkpoint.journal import JOURNAL_NAME
from offload.checkpoint.library import (
    check_pack,
    ensure_pack,
    list_packs,
    pack_model,
    pack_name,
    remove_pack,
)
from offload.checkpoint.lock import pack_lock
from offload.checkpoint.manifest import EXPERT_FILE_NAME, FORMAT_VERSION, MANIFEST_NAME, Manifest
from offload.checkpoint.source import CheckpointSource, open_source
from offload.config import EngineSettings
from offload.errors import ExpertFileError, UsageError
from offload.events import LoadProgress, Notice
from tests.checkpoint.packs import Stopped, ignore, planned, stop_after, tiny_source, write_pack


@pytest.fixture
def source(checkpoint: Path) -> CheckpointSource:
    return open_source(checkpoint)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing here may touch the user's own packs."""
    monkeypatch.setenv("RUN_LOCAL_CACHE", str(tmp_path / "user-cache"))
    return tmp_path / "user-cache"


def incomplete_pack(source: CheckpointSource, root: Path, name: str) -> Path:
    with pytest.raises(Stopped):
        write_pack(source, root / name, stop_after(planned(source).total_bytes // 2 + 1))
    return root / f"{name}.partial"


def names(root: Path | None) -> list[str]:
    return [pack.name for pack in list_packs(root)]


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "readable"),
    [
        ("org/Some-Model_1.5", "org--Some-Model_1.5"),
        ("demo", "demo"),
        ("my model (new)", "my--model--new"),
        ("../../etc/passwd", "etc--passwd"),
        ("模型", "model"),
        ("", "model"),
        (".hidden", "hidden"),
    ],
)
def test_pack_name_is_readable(model: str, readable: str, source: CheckpointSource) -> None:
    manifest = replace(planned(source), model=model, fingerprint="1a2b3c4d5e6f7081")
    assert pack_name(manifest) == f"{readable}-1a2b3c4d-native"


@given(st.text(max_size=300))
@example("org/" + "x" * 300)
def test_pack_name_is_a_plain_file_name(model: str) -> None:
    manifest = Manifest(model, None, "mixtral", "native", "1a2b3c4d5e6f7081", (), (), (), ())
    name = pack_name(manifest)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*-1a2b3c4d-native", name)
    assert len(name + ".partial") < 255


def test_pack_name_is_unique(source: CheckpointSource) -> None:
    manifest = planned(source)
    others = (replace(manifest, fingerprint="ffff"), replace(manifest, format="int4"), replace(manifest, model="b"))
    assert len({pack_name(m) for m in (manifest, *others)}) == 4
    assert pack_name(manifest) == pack_name(replace(manifest, revision="other")), "the same weights need one pack"


# --- listing --------------------------------------------------------------------------------------------------------


def test_list_packs(packed: Path, source: CheckpointSource) -> None:
    root = packed.parent
    (root / "a file").write_text("")
    (root / "begun.partial").mkdir()
    partial = incomplete_pack(source, root, "half")
    damaged, shortened = root / "damaged", root / "shortened"
    for folder in (damaged, shortened):
        shutil.copytree(packed, folder)
    (damaged / MANIFEST_NAME).write_text("{")
    os.truncate(shortened / EXPERT_FILE_NAME, 4096)
    found = {pack.name: pack for pack in list_packs(root)}
    assert list(found) == ["begun.partial", "damaged", "half.partial", "shortened", packed.name]
    assert [name for name, pack in found.items() if pack.complete] == [packed.name]
    whole = found[packed.name]
    assert (whole.model, whole.revision, whole.format, whole.experts) == ("tiny", None, "native", 32)
    assert found["half.partial"].folder == partial
    assert (found["half.partial"].model, found["half.partial"].experts) == ("-", 0)


def test_partial_with_a_manifest_is_incomplete(packed: Path) -> None:
    """Stopped between the manifest and the rename."""
    packed.rename(packed.with_name("x.partial"))
    (found,) = list_packs(packed.parent)
    assert not found.complete


def test_size_on_disk(packed: Path, source: CheckpointSource) -> None:
    partial = incomplete_pack(source, packed.parent, "half")
    for file in [*packed.iterdir(), *partial.iterdir()]:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # a file system may settle later how many blocks a file takes
    (half, whole) = list_packs(packed.parent)
    for pack, folder in ((whole, packed), (half, partial)):
        length = sum(file.stat().st_size for file in folder.iterdir())
        assert pack.bytes == sum(file.stat().st_blocks * 512 for file in folder.iterdir())
        assert length <= pack.bytes + 4096, "packs are not sparse"
    assert half.bytes < whole.bytes
    # space that is set aside and not written counts by what it takes, not by its length
    os.truncate(partial / EXPERT_FILE_NAME, 2**30)
    assert list_packs(packed.parent)[0].bytes < 2**20 + half.bytes


def test_other_folders_are_none_of_our_business(packed: Path) -> None:
    root = packed.parent
    for name, file in (("Documents", "thesis.txt"), ("extension", MANIFEST_NAME), ("letters.partial", "a.txt")):
        (root / name).mkdir()
        (root / name / file).write_text('{"manifest_version": 3}')
    (root / "empty").mkdir()
    assert names(root) == [packed.name]
    with pytest.raises(UsageError, match="there is no pack 'Documents'"):
        remove_pack("Documents", root)
    assert (root / "Documents" / "thesis.txt").exists()


def test_roots(packed: Path, tmp_path: Path) -> None:
    assert list_packs(tmp_path / "nothing") == []
    assert list_packs(None) == []
    (tmp_path / "file").write_text("")
    assert list_packs(tmp_path / "file") == []
    assert list_packs(packed) == list_packs(packed.parent), "--experts-dir may name a pack itself"


def test_default_root_is_the_cache_folder(packed: Path, cache: Path) -> None:
    shutil.copytree(packed.parent, cache / "packs")
    assert names(None) == [packed.name]
    assert remove_pack(packed.name).name == packed.name
    assert names(None) == []


def test_root_that_cannot_be_read(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ExpertFileError, match=r"cannot be read \(Permission denied\)"):
        list_packs(packed.parent)


# --- removing -------------------------------------------------------------------------------------------------------


def test_remove_pack(packed: Path) -> None:
    other = packed.with_name("other")
    shutil.copytree(packed, other)
    before = {pack.name: pack for pack in list_packs(packed.parent)}
    assert remove_pack("other", packed.parent) == before["other"]
    assert names(packed.parent) == [packed.name]
    assert not other.exists()
    assert sorted(path.name for path in packed.parent.iterdir()) == [packed.name], "no lock file is left"


def test_remove_an_incomplete_and_a_damaged_pack(packed: Path, source: CheckpointSource) -> None:
    incomplete_pack(source, packed.parent, "half")
    (packed / MANIFEST_NAME).write_text("{")
    for name in ("half.partial", packed.name):
        assert remove_pack(name, packed.parent).name == name
    assert not list(packed.parent.iterdir())


def test_unknown_name_lists_the_names(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, packed.with_name("other"))
    with pytest.raises(UsageError, match=f"--remove: there is no pack 'x'; there are: other, {packed.name}"):
        remove_pack("x", packed.parent)
    with pytest.raises(UsageError, match="there are: none"):
        remove_pack("x", tmp_path / "nothing")


@pytest.mark.parametrize(
    "name", ["../outside", "sub/../../outside", "", ".", "..", "/", "sub/pack", "{absolute}", "\0"]
)
def test_names_do_not_lead_out_of_the_root(name: str, packed: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(packed, outside)
    shutil.copytree(packed, packed.parent / "sub" / "pack")
    with pytest.raises(UsageError, match="there is no pack"):
        remove_pack(name.format(absolute=outside), packed.parent)
    assert len(list(outside.iterdir())) == len(list(packed.iterdir())) == 2
    assert (packed.parent / "sub" / "pack" / MANIFEST_NAME).exists()


@pytest.mark.parametrize("which", [MANIFEST_NAME, EXPERT_FILE_NAME])
def test_removal_that_fails_half_way(which: str, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == which:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(ExpertFileError, match=rf"{which}: cannot be removed"):
        patch.setattr(Path, "unlink", refuse)
        remove_pack(packed.name, packed.parent)
    (left,) = list_packs(packed.parent)
    if which == EXPERT_FILE_NAME:
        assert not left.complete
        with pytest.raises(ExpertFileError):
            ExpertFile(packed)
    else:
        assert left.complete, "nothing is gone yet"
    remove_pack(packed.name, packed.parent)
    assert names(packed.parent) == []


def test_files_of_others_are_left(packed: Path) -> None:
    (packed / "notes.txt").write_text("mine")
    with pytest.raises(ExpertFileError, match=r"cannot be removed \(Directory not empty\)"):
        remove_pack(packed.name, packed.parent)
    assert [file.name for file in packed.iterdir()] == ["notes.txt"]


def test_pack_that_is_a_link(packed: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "big disk"
    packed.rename(elsewhere)
    packed.symlink_to(elsewhere)
    assert names(packed.parent) == [packed.name]
    remove_pack(packed.name, packed.parent)
    assert not elsewhere.exists()
    assert not list(packed.parent.iterdir())


def test_pack_in_the_making_is_not_removed(packed: Path, source: CheckpointSource) -> None:
    partial = incomplete_pack(source, packed.parent, "half")
    with pack_lock(packed.parent / "half"), pytest.raises(ExpertFileError, match="another process is packing"):
        remove_pack("half.partial", packed.parent)
    assert (partial / EXPERT_FILE_NAME).exists()


# --- finding and making ---------------------------------------------------------------------------------------------


def ensure(
    source: CheckpointSource, experts_dir: Path | None = None, output: Path | None = None
) -> tuple[Path, list[Any]]:
    events: list[LoadProgress | Notice] = []
    folder = ensure_pack(source, "org/tiny", "main", "native", experts_dir, events.append, output)
    return folder, events


def test_first_use_packs_and_says_so_later_ones_do_not(source: CheckpointSource, tmp_path: Path, cache: Path) -> None:
    for experts_dir in (None, tmp_path / "new" / "folder"):
        folder, events = ensure(source, experts_dir)
        assert folder.parent == (experts_dir or cache / "packs")
        assert folder.name.startswith("org--tiny-")
        notice, *progress = events
        assert f"packing the experts of org/tiny into {folder}: 32 records, 1.1 MiB" in notice.text
        assert progress[-1].done == progress[-1].total
        assert ensure(source, experts_dir) == (folder, [])
        manifest = Manifest.read(folder)
        assert (manifest.model, manifest.revision, manifest.model_type) == ("org/tiny", "main", "mixtral")


def test_experts_dir_may_be_the_pack_itself(source: CheckpointSource, packed: Path) -> None:
    assert ensure(source, packed) == (packed, [])


@pytest.mark.parametrize("as_itself", [True, False])
def test_pack_of_another_checkpoint(as_itself: bool, packed: Path, tmp_path: Path) -> None:
    other = tiny_source("mixtral", tmp_path / "other", seed=1)
    match = (
        r"this pack was made from another checkpoint \(tiny, mixtral\); remove it or name another folder for org/tiny"
    )
    with pytest.raises(ExpertFileError, match=match):
        ensure(other, packed) if as_itself else ensure(other, output=packed)
    folder, _ = ensure(other, packed.parent)
    assert folder != packed, "beside it there is room for both"


def test_check_pack(whole_pack: Path, source: CheckpointSource) -> None:
    wanted, found = planned(source), Manifest.read(whole_pack)
    check_pack(whole_pack, found, wanted)
    check_pack(whole_pack, replace(found, model="other name", revision="x"), wanted)
    for changed in ({"fingerprint": "0" * 16}, {"model_type": "qwen3_moe"}):
        with pytest.raises(ExpertFileError, match="made from another checkpoint"):
            check_pack(whole_pack, replace(found, **changed), wanted)  # type: ignore[arg-type]
    with pytest.raises(ExpertFileError, match="the format of this pack is int4, not native; use --format int4, or"):
        check_pack(whole_pack, replace(found, format="int4"), wanted)


def test_check_pack_names_what_is_laid_out_otherwise(source: CheckpointSource, tmp_path: Path) -> None:
    wanted = planned(source, "int4")
    check_pack(tmp_path, wanted, wanted)
    layout = wanted.layouts[0]
    down, gate_up = layout.tensors
    changed: list[tuple[Manifest, str]] = [
        (replace(wanted, layers=wanted.layers[1:]), "its layers are others"),
        (replace(wanted, layers=tuple(replace(layer, path="x") for layer in wanted.layers)), "its layers are others"),
    ]
    for tensors, message in (
        (
            (replace(down, dtype="int4-g128"), gate_up),
            r"down_proj: int4-g128 \[64, 48\] instead of int4-g64 \[64, 48\]",
        ),
        ((replace(down, shape=(48, 64)), gate_up), r"down_proj: int4-g64 \[48, 64\] instead of int4-g64 \[64, 48\]"),
        ((gate_up,), r"down_proj: nothing instead of int4-g64 \[64, 48\]"),
        ((replace(down, offset=64), gate_up), "its tensors stand at other places"),
    ):
        changed.append((replace(wanted, layouts=(replace(layout, tensors=tensors),)), message))
    changed.append(
        (replace(wanted, layouts=(replace(layout, record_bytes=layout.record_bytes + 4096),)), "other places")
    )
    for found, message in changed:
        with pytest.raises(
            ExpertFileError, match=f"another version of run-local .*{message}.*; remove it and pack again"
        ):
            check_pack(tmp_path, found, wanted)


def test_pack_of_another_version_is_refused(packed: Path, source: CheckpointSource) -> None:
    path = packed / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(ExpertFileError, match="written by another version"):
        ensure(source, output=packed)


def test_pack_of_version_1_is_used(packed: Path, source: CheckpointSource) -> None:
    path = packed / MANIFEST_NAME
    data = json.loads(path.read_text()) | {"format_version": 1}
    del data["errors"]
    path.write_text(json.dumps(data))
    assert ensure(source, output=packed) == (packed, [])
    assert [pack.errors for pack in list_packs(packed)] == [()]


def test_output_folder_with_other_content(source: CheckpointSource, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(UsageError, match=f"{name}: exists and is no pack; choose another folder"):
            ensure(source, output=tmp_path / name)
    assert (tmp_path / "full" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"


def test_output_folder_that_is_half_removed(source: CheckpointSource, packed: Path) -> None:
    (packed / MANIFEST_NAME).unlink()
    with pytest.raises(ExpertFileError, match=r"half removed\?\); remove this folder"):
        ensure(source, output=packed)


def test_output_folder_that_is_empty_or_here(
    source: CheckpointSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    assert ensure(source, output=tmp_path / "empty")[0] == tmp_path / "empty"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert ensure(source, output=Path("pack"))[0] == tmp_path / "here" / "pack"
    shutil.rmtree("pack")
    assert ensure(source, output=Path("."))[0] == tmp_path / "here"
    assert sorted(file.name for file in (tmp_path / "here").iterdir()) == [EXPERT_FILE_NAME, MANIFEST_NAME]


def test_output_that_looks_incomplete(source: CheckpointSource, tmp_path: Path, packed: Path) -> None:
    with pytest.raises(UsageError, match=r"the ending .partial marks a pack that is not complete"):
        ensure(source, output=tmp_path / "x.partial")
    partial = packed.rename(packed.with_name("x.partial"))
    with pytest.raises(UsageError, match=r"the ending .partial"):
        ensure(source, experts_dir=partial)


def test_pack_model(checkpoint: Path, tmp_path: Path, cache: Path) -> None:
    settings = EngineSettings(model=str(checkpoint))
    found = pack_model(settings, ignore)
    assert found.folder.parent == cache / "packs"
    assert (found.model, found.experts, found.complete) == (checkpoint.name, 32, True)
    assert list_packs() == [found]
    elsewhere = pack_model(settings, ignore, tmp_path / "my pack")
    assert (elsewhere.folder, elsewhere.name) == (tmp_path / "my pack", "my pack")
    assert elsewhere.complete
    again = pack_model(EngineSettings(model=str(checkpoint), experts_dir=tmp_path / "my pack"), ignore)
    assert again == elsewhere
    with pytest.raises(UsageError, match="--format: 'int3'"):
        pack_model(replace(settings, format="int3"), ignore, tmp_path / "x")
    quantised = pack_model(replace(settings, format="int4"), ignore)
    assert quantised.folder.name.endswith("-int4")
    assert [layer for layer, _ in quantised.errors] == [0, 1, 2, 3]
    assert all(0.05 < error < 0.1 for _, error in quantised.errors)
    assert found.errors == ()
    os.truncate(found.folder / EXPERT_FILE_NAME, 4096)
    with pytest.raises(ExpertFileError, match="truncated or overwritten"):
        pack_model(settings, ignore)
    assert not (found.folder / JOURNAL_NAME).exists()
