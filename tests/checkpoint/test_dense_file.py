"""The dense file: what is in it, how it is written, and what happens to one that is damaged or foreign."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Chunk, WeightConverter

from offload.checkpoint import dense_file
from offload.checkpoint.dense_file import DenseFile, ensure_dense
from offload.checkpoint.fingerprint import checkpoint_fingerprint
from offload.checkpoint.library import list_packs, pack_model, remove_pack
from offload.checkpoint.lock import pack_lock
from offload.checkpoint.reading import Staging
from offload.checkpoint.source import CheckpointSource, open_source
from offload.compute.kernels import load_kernels
from offload.compute.matrix import MatrixLayout, empty_matrix, encode
from offload.config import EngineSettings
from offload.errors import ExpertFileError, ModelError
from offload.events import LoadProgress, Notice
from offload.model import transformers_weights as api
from offload.model.dense import find_dense
from tests.checkpoint.packs import Stopped, ignore, stop_after
from tests.tiny_models import build_tiny, load_reference

ROOT = Path(__file__).resolve().parents[2]
NAME = "dense-int4.safetensors"


@pytest.fixture
def source(checkpoint: Path) -> CheckpointSource:
    return open_source(checkpoint)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pack"
    folder.mkdir()
    return folder


def write(source: CheckpointSource, folder: Path, dense_format: str = "int4", on_event: Any = ignore) -> DenseFile:
    found = ensure_dense(source, folder, "tiny", dense_format, on_event)
    assert found is not None
    return found


def change_tensors(folder: Path, change: Any) -> Path:
    """Rewrite a checkpoint as one file of the tensors that ``change`` makes of its own."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# --- content --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense_format", ["int8", "int4"])
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v4"])
def test_content(architecture: str, dense_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any safetensors reader finds the stock model's matrices there, quantised; written in parts as in one go."""
    monkeypatch.setattr(dense_file, "_BLOCK", 1000)
    source = open_source(build_tiny(architecture, tmp_path / "model", dtype=torch.bfloat16, tokenizer=False))
    file = write(source, tmp_path, dense_format)
    tensors = load_file(file.path)
    model = load_reference(source.folder)
    matrices = find_dense(source.model, source.experts, dense_format)
    assert set(tensors) == {f"{dense.name}.{part}" for dense in matrices for part in ("codes", "params")}
    for dense in matrices:
        expected = empty_matrix(dense.layout)
        encode(model.get_parameter(f"{dense.name}.weight").detach(), expected, load_kernels())
        read = file.read(dense, lambda size: None)
        for part, mine, theirs in (("codes", read.codes, expected.codes), ("params", read.params, expected.params)):
            assert torch.equal(mine, theirs), dense.name
            assert torch.equal(mine, tensors[f"{dense.name}.{part}"])
    assert file.keys < set(source.skeleton_keys)
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.lock"))


def test_header(source: CheckpointSource, folder: Path) -> None:
    path = write(source, folder).path
    length = int.from_bytes(path.read_bytes()[:8], "little")
    said = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    assert length % 8 == 0
    assert (said["format_version"], said["fingerprint"]) == ("1", checkpoint_fingerprint(source.folder))
    assert json.loads(said["layouts"])["model.layers.0.self_attn.k_proj"] == [32, 64, 4, 64]
    assert "model.layers.0.self_attn.k_proj.weight" in json.loads(said["keys"])
    assert all(len(checksum) == 8 for checksum in json.loads(said["checksums"]).values())


def test_it_is_written_once_and_says_so(source: CheckpointSource, folder: Path) -> None:
    events: list[LoadProgress | Notice] = []
    path = write(source, folder, on_event=events.append).path
    notice, *progress = events
    assert isinstance(notice, Notice)
    assert notice.text.startswith(f"packing the other weights of tiny as int4 into {path}: 18 matrices, ")
    assert all(isinstance(event, LoadProgress) and event.stage == "pack" for event in progress)
    last = progress[-1]
    assert isinstance(last, LoadProgress) and last.done == last.total > 0
    written, events = path.stat().st_mtime_ns, []
    write(open_source(source.folder), folder, on_event=events.append)
    assert not events and path.stat().st_mtime_ns == written


def test_native_has_none(source: CheckpointSource, folder: Path) -> None:
    assert ensure_dense(source, folder, "tiny", "native", ignore) is None
    assert not list(folder.iterdir())


def test_both_formats_stand_side_by_side(source: CheckpointSource, folder: Path) -> None:
    write(source, folder, "int4")
    write(source, folder, "int8")
    assert sorted(file.name for file in folder.iterdir()) == [NAME, "dense-int8.safetensors"]


@pytest.mark.parametrize("kept", ["both", "embedding", "head"])
def test_tied_weights_stand_under_any_of_their_names(kept: str, tmp_path: Path) -> None:
    model = build_tiny("qwen3_moe", tmp_path / "model", tokenizer=False)
    whole = open_source(build_tiny("qwen3_moe", tmp_path / "whole", tokenizer=False))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if kept != "both":
            del tensors["lm_head.weight" if kept == "embedding" else "model.embed_tokens.weight"]

    source = open_source(change_tensors(model, change))
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
    file, expected = write(source, tmp_path / "mine"), write(whole, tmp_path / "theirs")
    mine, theirs = load_file(file.path), load_file(expected.path)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    ends = {"lm_head.weight", "model.embed_tokens.weight"}
    assert len(file.keys & ends) == (2 if kept == "both" else 1)


def test_weights_that_several_tensors_or_parts_of_one_make_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that keeps two matrices in one tensor, which transformers' conversion parts."""
    model = build_tiny("deepseek_v2", tmp_path / "model", tokenizer=False)
    plain = open_source(build_tiny("deepseek_v2", tmp_path / "plain", tokenizer=False))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        gate = [name for name in tensors if name.endswith("mlp.gate_proj.weight")]
        assert gate
        for name in gate:
            parts = [tensors.pop(name), tensors.pop(name.replace("gate_proj", "up_proj"))]
            tensors[name.replace("gate_proj", "fused")] = torch.cat(parts)

    change_tensors(model, change)
    converter = WeightConverter(
        "mlp.fused.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], operations=[Chunk(dim=0)]
    )
    mapping = api.get_model_conversion_mapping
    monkeypatch.setattr(api, "get_model_conversion_mapping", lambda model: [*mapping(model), converter])
    source = open_source(model)
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
    file = write(source, tmp_path / "mine")
    assert "model.layers.0.mlp.fused.weight" in file.keys
    mine, theirs = load_file(file.path), load_file(write(plain, tmp_path / "theirs").path)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    only = {"model.layers.0.mlp.gate_proj.weight"}
    with pytest.raises(ModelError, match=r"mlp.up_proj.weight and weights that are quantised in one tensor, .* native"):
        source.find_parameters(only)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_only_a_part_of_a_matrix_is_in_memory(
    source: CheckpointSource, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights that are alive at once are few, however large a matrix is."""
    block, alive, peak, total = 2048, 0, 0, 0
    monkeypatch.setattr(dense_file, "_BLOCK", block)
    read = source._stage

    def release(size: int) -> None:
        nonlocal alive
        alive -= size

    def watched(staging: Staging, key: str, rows: slice) -> torch.Tensor:
        nonlocal alive, peak, total
        tensor = read(staging, key, rows)
        assert staging.nbytes <= 4 * block
        alive, total = alive + tensor.numel(), total + tensor.numel()
        peak = max(peak, alive)
        weakref.finalize(tensor, release, tensor.numel())
        return tensor

    monkeypatch.setattr(source, "_stage", watched)
    write(source, folder)
    assert total == sum(dense.layout.rows * dense.layout.columns for dense in find_dense(source.model, [], "int4"))
    assert total > 40 * block
    assert peak <= 2 * block


# --- writing that does not end --------------------------------------------------------------------------------------


def test_broken_off_in_the_middle(source: CheckpointSource, folder: Path) -> None:
    with pytest.raises(Stopped):
        write(source, folder, on_event=lambda event: isinstance(event, LoadProgress) and stop_after(20_000)(event))
    assert not list(folder.iterdir())
    write(source, folder)


STUCK = """
import sys, time
from pathlib import Path
from offload.checkpoint import dense_file
from offload.checkpoint.source import open_source

write, written = dense_file.write_all, []
def stuck(*arguments):
    if len(written) == 20:
        print("stuck", flush=True)
        time.sleep(600)
    written.append(1)
    write(*arguments)
dense_file.write_all = stuck
dense_file.ensure_dense(open_source(Path(sys.argv[1])), Path(sys.argv[2]), "tiny", "int4", lambda event: None)
"""


def test_killed_in_the_middle(source: CheckpointSource, folder: Path) -> None:
    command = [sys.executable, "-c", STUCK, str(source.folder), str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "stuck\n"
        with pytest.raises(ExpertFileError, match="another process is packing this model now"):
            write(source, folder)
        child.send_signal(signal.SIGKILL)
    assert [file.name for file in folder.iterdir()] == [f"{NAME}.partial"]
    with pytest.raises(ExpertFileError):
        DenseFile(folder / f"{NAME}.partial", find_dense(source.model, source.experts, "int4"), "")
    file = write(source, folder)
    assert [file.name for file in folder.iterdir()] == [NAME]
    assert all(file.read(dense, lambda size: None) for dense in file.matrices)


def test_a_disk_that_is_too_small(source: CheckpointSource, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**20, 2**20))
    with pytest.raises(ExpertFileError, match=r"packing needs .* but only 1.0 MiB are free; .* --experts-dir"):
        write(source, folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("number", "match"),
    [(errno.ENOSPC, "the disk is full; free some space"), (errno.EIO, "cannot be written")],
)
def test_a_write_that_fails(
    number: int, match: str, source: CheckpointSource, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch, pytest.raises(ExpertFileError, match=match):
        patch.setattr(dense_file, "write_all", fail)
        write(source, folder)
    assert not list(folder.iterdir())


def test_another_process_packs(source: CheckpointSource, folder: Path) -> None:
    with pack_lock(folder), pytest.raises(ExpertFileError, match="another process is packing this model now"):
        write(source, folder)


# --- checkpoints that do not fit ------------------------------------------------------------------------------------


def test_a_weight_is_missing_or_has_another_shape(tmp_path: Path) -> None:
    key = "model.layers.1.self_attn.o_proj.weight"
    for number, (shape, match) in enumerate(
        [
            (None, f"weight {key} is missing"),
            ((64, 60), f"weight {key} has another shape than config.json says"),
            ((60, 64), f"weight {key} has another shape than config.json says"),
            ((64,), f"weight {key} has another shape than config.json says"),
        ]
    ):

        def change(tensors: dict[str, torch.Tensor], shape: Any = shape) -> None:
            del tensors[key]
            if shape is not None:
                tensors[key] = torch.ones(shape)

        model = build_tiny("mixtral", tmp_path / f"model{number}", tokenizer=False)
        with pytest.raises(ModelError, match=match):
            write(open_source(change_tensors(model, change)), tmp_path)
        assert not list(tmp_path.glob("dense*"))


def test_tied_weights_that_differ(tmp_path: Path) -> None:
    model = build_tiny("qwen3_moe", tmp_path / "model", tokenizer=False)
    change_tensors(model, lambda tensors: tensors.update({"lm_head.weight": torch.ones(320, 64)}))
    with pytest.raises(ModelError, match=r"ties .* but the checkpoint has other weights for each; .* native"):
        write(open_source(model), tmp_path)


# --- files that cannot be used --------------------------------------------------------------------------------------

REMEDY = "remove this file, and the next start writes it again"


def refused(source: CheckpointSource, folder: Path, dense_format: str = "int4") -> str:
    """The one line that says what is wrong with the file that is there."""
    with pytest.raises(ExpertFileError) as caught:
        file = write(source, folder, dense_format)
        for dense in file.matrices:
            file.read(dense, lambda size: None)
    text = str(caught.value)
    assert text.startswith(f"{folder}/dense-{dense_format}.safetensors: ") and text.endswith(REMEDY)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_truncated(length: int, source: CheckpointSource, folder: Path) -> None:
    path = write(source, folder).path
    os.truncate(path, length if length >= 0 else path.stat().st_size + length)
    assert "is damaged or incomplete" in refused(source, folder)


def test_one_bit_is_wrong(source: CheckpointSource, folder: Path) -> None:
    path = write(source, folder).path
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)
    assert "params is damaged (its checksum differs)" in refused(source, folder)


def test_of_another_checkpoint(source: CheckpointSource, folder: Path, tmp_path: Path) -> None:
    write(open_source(build_tiny("mixtral", tmp_path / "other", seed=1, tokenizer=False)), folder)
    assert "made from another checkpoint" in refused(source, folder)


def test_of_another_format(source: CheckpointSource, folder: Path) -> None:
    write(source, folder, "int8").path.rename(folder / NAME)
    assert "laid out for another version or format" in refused(source, folder)


@pytest.mark.parametrize("said", [None, {"format_version": "2"}, {"format": "pt"}])
def test_of_another_version_or_no_dense_file(said: Any, source: CheckpointSource, folder: Path) -> None:
    save_file({"a": torch.ones(3)}, folder / NAME, metadata=said)
    assert "written by another version of run-local" in refused(source, folder)


@pytest.mark.parametrize("field", ["keys", "checksums"])
@pytest.mark.parametrize("value", ["{", "3", None])
def test_a_header_that_makes_no_sense(field: str, value: Any, source: CheckpointSource, folder: Path) -> None:
    file = write(source, folder)
    said = dict(file._said)
    said.pop(field)
    save_file(load_file(file.path), file.path, metadata=said | ({field: value} if value is not None else {}))
    assert "damaged" in refused(source, folder)


def test_tensors_that_are_not_what_the_header_says(source: CheckpointSource, folder: Path) -> None:
    file = write(source, folder)
    tensors = load_file(file.path)
    name = "model.layers.0.self_attn.q_proj.codes"
    for change in ({name: tensors[name][:-1].contiguous()}, {name: tensors[name].float()}):
        save_file(tensors | change, file.path, metadata=dict(file._said))
        assert f"{name} has another shape or dtype" in refused(source, folder)
    del tensors[name]
    save_file(tensors, file.path, metadata=dict(file._said))
    assert "is damaged or incomplete" in refused(source, folder)


# --- the pack -------------------------------------------------------------------------------------------------------


def test_pack_writes_it_and_models_counts_and_removes_it(checkpoint: Path, tmp_path: Path) -> None:
    plain = pack_model(EngineSettings(model=str(checkpoint), experts_dir=tmp_path), ignore)
    settings = EngineSettings(model=str(checkpoint), experts_dir=tmp_path, dense_format="int4")
    packed = pack_model(settings, ignore)
    size = (packed.folder / NAME).stat().st_size
    assert plain.bytes + size <= packed.bytes <= plain.bytes + size + 4096
    assert packed.complete and list_packs(tmp_path) == [packed]
    (packed.folder / f"{NAME}.partial").write_text("left by a kill")
    remove_pack(packed.name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_removal_that_fails_at_the_dense_file(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack_model(EngineSettings(model=str(checkpoint), experts_dir=tmp_path, dense_format="int4"), ignore)
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == NAME:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(ExpertFileError, match=rf"{NAME}: cannot be removed"):
        patch.setattr(Path, "unlink", refuse)
        remove_pack(packed.name, tmp_path)
    (left,) = list_packs(tmp_path)
    assert not left.complete
    remove_pack(packed.name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_large_matrix_is_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of any number, in blocks that do not divide them."""
    from tests.tiny_models import tiny_config

    config = tiny_config("mixtral")
    config.vocab_size = 1001
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    source = open_source(tmp_path / "model")
    monkeypatch.setattr(dense_file, "_BLOCK", 64 * 77)
    file = write(source, tmp_path)
    (embedding,) = (dense for dense in file.matrices if dense.name == "model.embed_tokens")
    assert embedding.layout == MatrixLayout(1001, 64, 4, 64)
    parts: list[int] = []
    read = file.read(embedding, parts.append)
    assert sum(parts) == embedding.layout.bytes and len(parts) > 5
    expected = empty_matrix(embedding.layout)
    encode(load_reference(source.folder).get_input_embeddings().weight.detach(), expected, load_kernels())
    assert torch.equal(read.codes, expected.codes) and torch.equal(read.params, expected.params)
