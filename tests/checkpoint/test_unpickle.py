"""Pickled checkpoints become safetensors with the same weights, and nothing in them is run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from offload.checkpoint.source import open_source
from offload.checkpoint.unpickle import main
from tests.tiny_models import build_tiny


@pytest.fixture
def pickled(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint in two pickles, of which one holds a tensor twice, and its weights."""
    folder = build_tiny("mixtral", tmp_path / "pickled")
    weights: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors*"):
        weights |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    names = sorted(weights)
    halves = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file_name, some in halves.items():
        torch.save({name: weights[name] for name in some} | {"twice": weights[some[0]]}, folder / file_name)
    index = {name: file_name for file_name, some in halves.items() for name in some}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return folder, weights


def test_the_weights_are_the_same(pickled: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, weights = pickled
    assert main([str(folder), str(tmp_path / "out")]) == 0
    found: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == weights.keys() | {"twice"}
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    source = open_source(tmp_path / "out")
    assert len(source.experts) == 4 and (tmp_path / "out" / "tokenizer.json").exists()
    source.close()


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(
    pickled: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = pickled
    trap = tmp_path / "trap"
    torch.save({"a": torch.ones(2), "b": Harmful(trap)}, folder / "pytorch_model-00002-of-00002.bin")
    assert main([str(folder), str(tmp_path / "out")]) == 1
    assert "it is damaged, or holds more than tensors, which is not loaded" in capsys.readouterr().err
    assert not trap.exists()


def test_what_is_refused(
    pickled: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = pickled
    assert main([str(folder)]) == 2
    assert main([str(folder), str(folder)]) == 1
    assert "it exists; name a new folder" in capsys.readouterr().err
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    assert main([str(folder), str(tmp_path / "out")]) == 1
    assert "pytorch_model-00002-of-00002.bin is missing; download it" in capsys.readouterr().err
