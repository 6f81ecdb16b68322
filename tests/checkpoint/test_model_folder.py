"""``--model DIR``: whole folders pass, and each way of being broken gives one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offload.checkpoint.hub import ResolvedModel, resolve_model
from offload.errors import ModelError, RunLocalError, UsageError

INDEX = "model.safetensors.index.json"


def find(model: str | Path, weights: bool = True, revision: str | None = None) -> ResolvedModel:
    def no_event(event: object) -> None:
        raise AssertionError(event)

    return resolve_model(str(model), revision=revision, offline=True, on_event=no_event, weights=weights)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "my model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "mixtral"}')
    (model / "model.safetensors").write_bytes(b"x" * 64)
    return model


def shard(folder: Path, *names: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {str(i): name for i, name in enumerate(names)}}))


def test_whole_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(folder) == ResolvedModel("my model", folder, None)
    monkeypatch.chdir(folder)
    assert find(".").name == "my model"
    monkeypatch.chdir(folder.parent)
    assert find("my model").name == "my model"
    assert find("./my model").name == "my model"
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find("~/my model").folder == folder


def test_mistrals_own_layout(folder: Path) -> None:
    (folder / "config.json").rename(folder / "params.json")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    assert find(folder).name == "my model"
    (folder / "params.json").write_text("{")
    with pytest.raises(ModelError, match=r"params.json is damaged"):
        find(folder)


def test_missing_shard_is_named(folder: Path) -> None:
    shard(folder, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"x" * 64)
    with pytest.raises(ModelError, match=r"incomplete: model-00002-of-00002.safetensors of 2 weight files missing"):
        find(folder)
    assert find(folder, weights=False).name == "my model"


DAMAGED_MAPS = ("{}", '{"a": "/etc/passwd"}', '{"a": "../x.safetensors"}', '{"a": "pytorch_model.bin"}', '{"a": 3}')


@pytest.mark.parametrize("index", ["{", "[]", "{}", *(f'{{"weight_map": {value}}}' for value in DAMAGED_MAPS)])
def test_damaged_index(folder: Path, index: str) -> None:
    (folder / INDEX).write_text(index)
    with pytest.raises(ModelError, match="is damaged"):
        find(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [("pytorch_model.bin", "pickled"), ("model.pt", "pickled"), ("a.txt", "no \\*.safetensors")],
)
def test_folder_without_safetensors(folder: Path, name: str, message: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=message):
        find(folder)


def test_git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs\noid sha256:0\nsize 5\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        find(folder)


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[1]"])
def test_damaged_config(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=r"config.json is damaged"):
        find(folder)


def test_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"it has no config.json"):
        find(folder)


def test_paths_that_are_no_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        find(folder / "nothing")
    with pytest.raises(ModelError, match="is not a folder"):
        find(folder / "config.json")


@pytest.mark.parametrize("model", ["mixtral", "a/b/c", "org/", "/../x\0", "org/na me", "org/..", "-x/y", "http://x/y"])
def test_what_is_neither_folder_nor_hub_id(model: str) -> None:
    with pytest.raises(RunLocalError):
        find(model)


def test_revision_with_a_folder(folder: Path) -> None:
    with pytest.raises(UsageError, match="--revision"):
        find(folder, revision="main")
