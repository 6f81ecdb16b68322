"""A manifest survives the way through its file, and one that is damaged, foreign or impossible is refused in a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    LayerLayout,
    Manifest,
    RecordLayout,
    TensorLayout,
    align,
)
from offload.errors import ExpertFileError

SMALL = RecordLayout(4096, (TensorLayout("down_proj", (8, 4), "float32", 0, 128),))
LARGE = RecordLayout(
    8192, (TensorLayout("down_proj", (8, 8), "bfloat16", 0, 128), TensorLayout("up_proj", (64, 64), "uint8", 128, 4096))
)
MANIFEST = Manifest(
    model="org/модель",
    revision="abc",
    model_type="mixtral",
    format="native",
    fingerprint="0123456789abcdef",
    layouts=(SMALL, LARGE),
    layers=(
        LayerLayout(1, "model.layers.1.mlp.experts", 3, 0, 0),
        LayerLayout(4, "model.layers.4.mlp.experts", 2, 1, 12288),
    ),
    checksums=(1, 2, 3, 4, 2**32 - 1),
    errors=(None, 0.0819),
)


def test_round_trip_and_sizes(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path)
    assert Manifest.read(tmp_path) == MANIFEST
    assert (MANIFEST.num_records, MANIFEST.total_bytes, MANIFEST.slot_bytes) == (5, 3 * 4096 + 2 * 8192, 8192)
    assert [MANIFEST.bytes_of(n) for n in range(6)] == [0, 4096, 8192, 12288, 20480, 28672]


@pytest.mark.parametrize(("offset", "aligned"), [(0, 0), (1, 64), (64, 64), (65, 128)])
def test_align(offset: int, aligned: int) -> None:
    assert align(offset, 64) == aligned


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Write :data:`MANIFEST` into ``folder``, edited."""
    MANIFEST.write(folder)
    path = folder / MANIFEST_NAME
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def test_version_1_is_read_without_errors(tmp_path: Path) -> None:
    change(tmp_path, lambda data: [data.pop("errors"), data.update(format_version=1)])
    assert Manifest.read(tmp_path) == replace(MANIFEST, errors=(None, None), format_version=1)
    change(tmp_path, lambda data: data.pop("errors"))
    with pytest.raises(ExpertFileError, match=r"the manifest is damaged \('errors'\)"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1", None, True])
def test_other_version(version: object, tmp_path: Path) -> None:
    """Said before anything else is looked at: the rest of the file may mean something else there."""
    change(tmp_path, lambda data: [data.clear(), data.update(format_version=version)])
    with pytest.raises(ExpertFileError, match=r"another version of run-local .*pack the model again"):
        Manifest.read(tmp_path)


IMPOSSIBLE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no version": lambda d: d.pop("format_version"),
    "missing field": lambda d: d.pop("fingerprint"),
    "unknown field": lambda d: d.update(more=1),
    "no layers": lambda d: d.update(layers=[]),
    "layers are text": lambda d: d.update(layers="text"),
    "layer without an offset": lambda d: d["layers"][0].pop("offset"),
    "layer overlaps the one before": lambda d: d["layers"][1].update(offset=8192),
    "gap between layers": lambda d: d["layers"][1].update(offset=16384),
    "negative offset": lambda d: d["layers"][0].update(offset=-4096),
    "layer twice": lambda d: d["layers"][1].update(layer=1),
    "no experts": lambda d: d["layers"][0].update(experts=0),
    "experts is text": lambda d: d["layers"][0].update(experts="3"),
    "unknown layout": lambda d: d["layers"][1].update(layout=2),
    "negative layout": lambda d: d["layers"][1].update(layout=-1),
    "record size of no block": lambda d: d["layouts"][1].update(record_bytes=8191),
    "record size zero": lambda d: d["layouts"][0].update(record_bytes=0),
    "tensor behind the record": lambda d: d["layouts"][0]["tensors"][0].update(offset=4000),
    "tensor before the record": lambda d: d["layouts"][0]["tensors"][0].update(offset=-64),
    "tensor of negative size": lambda d: d["layouts"][0]["tensors"][0].update(bytes=-1),
    "shape is a number": lambda d: d["layouts"][0]["tensors"][0].update(shape=3),
    "too few checksums": lambda d: d["checksums"].pop(),
    "too many checksums": lambda d: d["checksums"].append(0),
    "checksums are a number": lambda d: d.update(checksums=7),
    "too few errors": lambda d: d["errors"].pop(),
    "error is text": lambda d: d["errors"].append(d["errors"].pop() and "0.08"),
    "error is no number": lambda d: d.update(errors=[None, float("nan")]),
    "error is negative": lambda d: d.update(errors=[None, -0.5]),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_content(name: str, tmp_path: Path) -> None:
    change(tmp_path, IMPOSSIBLE[name])
    with pytest.raises(ExpertFileError, match=r"the manifest is damaged .* pack the model again") as caught:
        Manifest.read(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b'{"format_version": 1}'])
def test_damaged_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(ExpertFileError, match="the manifest is damaged"):
        Manifest.read(tmp_path)


def test_no_pack_here(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ExpertFileError, match="there is no pack here"):
            Manifest.read(folder)
    (tmp_path / MANIFEST_NAME).mkdir()
    with pytest.raises(ExpertFileError, match="cannot be read"):
        Manifest.read(tmp_path)
