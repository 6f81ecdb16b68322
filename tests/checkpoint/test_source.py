"""Checkpoints that cannot be run are refused by name in one line, before or while they are packed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from offload.checkpoint.model_folder import INDEX_FILE
from offload.checkpoint.source import open_source, tensor_files
from offload.errors import ModelError
from tests.checkpoint.packs import write_pack
from tests.tiny_models import build_tiny


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the mixtral checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder: Path, match: str) -> None:
    """Packing ``folder`` fails with one line that matches, and leaves no pack."""
    output = folder.with_name("pack")
    with pytest.raises(ModelError, match=match) as caught:
        write_pack(open_source(folder), output)
    assert "\n" not in str(caught.value)
    assert not output.exists()


# --- sorting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "jamba", "qwen3_5_moe"])
def test_every_tensor_is_an_expert_or_skeleton(model_type: str, tmp_path: Path) -> None:
    source = open_source(build_tiny(model_type, tmp_path, tokenizer=False))
    experts = [key for found in source.expert_sources.values() for keys in found.keys.values() for key in keys]
    assert len(experts) == len(set(experts))
    assert not set(experts) & set(source.skeleton_keys)
    left = source.files.keys() - set(experts) - set(source.skeleton_keys)
    assert all("visual" in key for key in left), "only what the text model does not have is left out"
    assert all(file.exists() for file in source.files.values())


def test_kimi_k2_is_read_as_what_it_is(tmp_path: Path) -> None:
    folder = build_tiny("deepseek_v3", tmp_path, tokenizer=False)
    known = open_source(folder)
    edit_config(folder, model_type="kimi_k2", auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"})
    source = open_source(folder)
    assert type(source.model) is type(known.model)
    assert (source.expert_sources.keys(), source.dtype) == (known.expert_sources.keys(), known.dtype)


@pytest.mark.parametrize("weights", [True, False])
def test_dtype_of_a_checkpoint_whose_config_names_none(weights: bool, model: Path) -> None:
    """That of its first weights, which codes of 8 bits are not; without files that of most published models."""
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]
    (model / "config.json").write_text(json.dumps(config))
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        first = min(tensors)
        tensors |= {f"a.{first}": tensors[first].to(torch.float8_e4m3fn)}
        file.unlink()
        if weights:
            save_file({name: t if name != first else t.half() for name, t in tensors.items()}, file)
    (model / INDEX_FILE).unlink()
    assert open_source(model, weights=weights).dtype == (torch.float16 if weights else torch.bfloat16)


def test_planning_reads_the_config_alone(model: Path) -> None:
    for file in [*model.glob("*.safetensors"), model / INDEX_FILE]:
        file.unlink()
    source = open_source(model, weights=False)
    assert [(module.layer, module.num_experts) for module in source.experts] == [(n, 8) for n in range(4)]
    assert not source.files
    refused(model, r"there are no .safetensors files; only safetensors checkpoints are loaded")


def test_one_file_without_an_index(tmp_path: Path) -> None:
    folder = build_tiny("mixtral", tmp_path / "model", max_shard_size="1GB", tokenizer=False)
    assert not (folder / INDEX_FILE).exists()
    source = open_source(folder)
    assert {file.name for file in source.files.values()} == {"model.safetensors"}
    write_pack(source, tmp_path / "pack")


def test_tensors_that_the_index_does_not_list_are_not_used(model: Path) -> None:
    save_file({"stray": torch.zeros(3)}, model / "consolidated.safetensors")
    assert "stray" not in tensor_files(model)


def test_files_open_again_after_close(model: Path) -> None:
    source = open_source(model)
    before = source.read_expert(source.experts[1], 3)
    source.close()
    after = source.read_expert(source.experts[1], 3)
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- damaged files --------------------------------------------------------------------------------------------------


def test_missing_shard(model: Path) -> None:
    (model / "model-00003-of-00009.safetensors").unlink()
    refused(model, f"model-00003-of-00009.safetensors is missing, though {INDEX_FILE} lists it; download it again")


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_truncated_shard(size: int, model: Path) -> None:
    file = model / "model-00003-of-00009.safetensors"
    os.truncate(file, size if size >= 0 else file.stat().st_size - 1)
    refused(model, r"model-00003-of-00009.safetensors: the file is damaged or incomplete .*download it again")


def test_header_that_makes_no_sense(model: Path) -> None:
    file = model / "model-00003-of-00009.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + b"{" * 100)
    refused(model, "the file is damaged or incomplete")


def test_index_names_a_tensor_that_is_in_no_file(model: Path) -> None:
    index = json.loads((model / INDEX_FILE).read_text())
    index["weight_map"]["model.layers.9.lost"] = "model-00001-of-00009.safetensors"
    (model / INDEX_FILE).write_text(json.dumps(index))
    refused(model, f"tensor model.layers.9.lost is in {INDEX_FILE} but in no file; download the files again")


def test_index_names_the_wrong_file(model: Path, tmp_path: Path) -> None:
    """The files are all there, so the headers decide."""
    index = json.loads((model / INDEX_FILE).read_text())
    names = sorted(set(index["weight_map"].values()))
    wrong = dict(zip(names, names[1:] + names[:1], strict=True))
    right = open_source(model).files
    index["weight_map"] = {key: wrong[name] for key, name in index["weight_map"].items()}
    (model / INDEX_FILE).write_text(json.dumps(index))
    assert open_source(model).files == right


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": []}}', "\udcff"]
)
def test_damaged_index(content: str, model: Path) -> None:
    (model / INDEX_FILE).write_bytes(content.encode(errors="surrogateescape"))
    refused(model, "the index is damaged .*; download it again")


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Load all tensors, edit them, and save them as one file."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / INDEX_FILE).unlink(missing_ok=True)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_one_expert_is_missing(model: Path) -> None:
    rewrite(
        model, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".2.block_sparse_moe.experts.7." in key]
    )
    refused(model, "there are weights of 7 experts .*, but config.json says 8")


def test_no_expert_of_a_layer(model: Path) -> None:
    rewrite(model, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".2.block_sparse_moe.experts." in key])
    refused(model, r"the checkpoint has no weights for model.layers.2.mlp.experts.\w+; its files do not fit its config")


# --- a config that does not fit -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 128}, "has shape .*config.json says"),
        ({"intermediate_size": 32}, "has shape .*config.json says"),
        ({"num_local_experts": 4}, "there are weights of 8 experts .* but config.json says 4"),
        ({"num_local_experts": 16}, "there are weights of 8 experts .* but config.json says 16"),
        ({"num_hidden_layers": 5}, "has no weights for model.layers.4"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config_with_other_shapes(values: dict[str, Any], message: str, model: Path) -> None:
    edit_config(model, **values)
    refused(model, message)


@pytest.mark.parametrize("experts", [4, 16])
@pytest.mark.parametrize("model_type", ["granitemoe", "gpt_oss", "aria_text"])
def test_config_with_another_number_of_fused_experts(model_type: str, experts: int, tmp_path: Path) -> None:
    model = build_tiny(model_type, tmp_path / "model", tokenizer=False)
    edit_config(model, **{"moe_num_experts" if model_type == "aria_text" else "num_local_experts": experts})
    refused(model, f"there are weights of 8 experts .* but config.json says {experts}")


@pytest.mark.parametrize("quantization", [{"quant_method": "aqlm"}, {"quant_method": "hqq"}, {"bits": 4}])
def test_unknown_quantisation_is_refused_by_name(quantization: dict[str, Any], model: Path) -> None:
    edit_config(model, quantization_config=quantization)
    name = quantization.get("quant_method", "no quant_method is named")
    refused(model, rf"quantised in a way that is not supported \({name}\); these are: fp8.* --format int8 or int4")


def test_dense_model_is_refused_by_name(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    refused(tmp_path / "model", "model_type 'llama' has no routed experts .*only Mixture-of-Experts models")


@pytest.mark.parametrize("model_type", ["bert", "vit", "clip"])
def test_model_that_writes_no_text(model_type: str, model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": model_type}))
    refused(model, rf"'{model_type}'|no {model_type} model")


@pytest.mark.parametrize(
    ("model_type", "nearest"),
    [
        ("qwen3_moes", "the nearest that can be run: qwen3_moe and "),
        ("never_heard_of", r"[0-9]+ kinds of models can be run, such as mixtral, qwen3_moe, deepseek_v3 and gpt_oss"),
    ],
)
def test_unknown_model_type(model_type: str, nearest: str, model: Path) -> None:
    edit_config(model, model_type=model_type)
    refused(model, f"config.json: model_type '{model_type}' is unknown; {nearest}")


@pytest.mark.parametrize("model_type", ["", None, 3])
def test_model_type_that_is_none(model_type: object, model: Path) -> None:
    edit_config(model, model_type=model_type)
    refused(model, r"config.json: (the config cannot be used|it names no model_type)")


def test_known_families_that_cannot_be_run(model: Path) -> None:
    edit_config(model, model_type="minimax")
    refused(model, "minimax models cannot be run: they keep a cache .*; the nearest that can be run: minimax_m2$")


def test_config_that_wants_its_own_code(model: Path) -> None:
    edit_config(model, model_type="mine", auto_map={"AutoConfig": "configuration.MyConfig"})
    (model / "configuration.py").write_text("raise SystemExit('this ran')")
    refused(model, r"config.json: model_type 'mine' is unknown")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"model_type": "mixtral", "num_hidden_layers": "many"}'])
def test_damaged_config(content: str, model: Path) -> None:
    (model / "config.json").write_text(content)
    refused(model, r"config.json")
