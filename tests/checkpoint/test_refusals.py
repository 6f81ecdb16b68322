"""What cannot be run is refused in one line that names it and says what helps, before any weight is read."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from offload.checkpoint.hub import resolve_model
from offload.checkpoint.source import open_source
from offload.errors import ModelError
from offload.model.families.known import what_runs_instead
from tests.checkpoint.packs import ignore
from tests.gguf_models import build_gguf
from tests.tiny_models import build_tiny

QWEN = {
    "model_type": "qwen3_moe", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 320,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "torch_dtype": "bfloat16",
}  # fmt: skip
ANOTHER = "; use another checkpoint of this model, such as an unquantised one with --format int8 or int4"
LORA = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3-30B-A3B"})


def refused(folder: Path, weights: bool) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(str(folder), revision=None, offline=True, on_event=ignore, weights=weights)
        open_source(folder, weights=weights).close()
    line = str(caught.value)
    assert ("\n" not in line and str(folder) in line) or "model_type" in line
    return line


def config_of(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"model_type": "deepseek_v9"}, "'deepseek_v9' is unknown; the nearest that can be run: deepseek_v"),
        ({"model_type": "foobar"}, "'foobar' is unknown; 73 kinds of models can be run, such as mixtral"),
        (
            {"model_type": "qwen9_moe", "auto_map": {"AutoConfig": "configuration_qwen9.Qwen9Config"}},
            "'qwen9_moe' is unknown; the code that the checkpoint has for it is not run; the nearest .*: qwen",
        ),
        ({"architectures": ["GlmNineForCausalLM"]}, "it names no model_type, .* 73 kinds of models can be run"),
        ({"model_type": "llama"}, "only Mixture-of-Experts models are run; the nearest that can be run: llama4"),
        ({"model_type": "mistral"}, "no routed experts .* the nearest that can be run: mistral"),
        ({"model_type": "t5"}, "transformers has no text generation model for model_type 't5'; 73 kinds of models"),
    ],
)
def test_other_models(config: dict[str, Any], line: str, tmp_path: Path) -> None:
    assert re.search(line, refused(config_of(tmp_path, config), False))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("phi3", "phimoe"),
        ("olmo2", "olmoe"),
        ("gpt2", "gpt_oss"),
        ("granite", "granitemoe"),
        ("hunyuan_v1_dense", "hunyuan_v1_moe"),
        ("exaone4", "exaone_moe"),
        ("mixtrall", "mixtral"),
    ],
)
def test_the_nearest_is_of_the_same_family(name: str, nearest: str) -> None:
    assert nearest in what_runs_instead(name).removeprefix("the nearest that can be run: ").split(" and ")


GROUP = {"group_0": {"weights": {"num_bits": 3, "type": "int"}}}


@pytest.mark.parametrize(
    ("quantisation", "line"),
    [
        ({"quant_method": "exl3", "bits": 4}, "not supported (exl3); these are: fp8, mxfp4, compressed-tensors, gptq"),
        (
            {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
            "the modelopt quant_algo 'W4A8_AWQ' is not supported; these are: NVFP4, W4A16_NVFP4, FP8, MXFP8,",
        ),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"model.layers.0.mlp.experts": {"quant_algo": "NVFP4_SVDQUANT"}},
            },
            "the modelopt quant_algo 'NVFP4_SVDQUANT' is not supported; these are: ",
        ),
        ({"bits": 4, "group_size": 64}, "(MLX, 4 bits); these are: "),
        ({"something": 4}, "(no quant_method is named); these are: "),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ weights of 3 bits are not supported; 4 or 8 are" + ANOTHER),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin' is not supported; gptq and"),
        ({"quant_method": "gptq", "bits": "four"}, "the quantization_config is damaged"),
        (
            {"quant_method": "awq", "bits": 8},
            "AWQ weights of 8 bits in version 'gemm' are not supported; 4 bits in gemm",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "in version 'gemv' are not supported"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes weights of 8 bits are not supported"),
        (
            {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
            "'mxfp4-pack-quantized' is not supported; these are: pack-quantized, float-quantized, naive-quantized, "
            "nvfp4-pack-quantized" + ANOTHER,
        ),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "'int-quantized' is not supported"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": GROUP},
            "compressed-tensors weights of 3 bits are not supported; 4 or 8 are",
        ),
    ],
)
def test_other_quantisations(quantisation: dict[str, Any], line: str, tmp_path: Path) -> None:
    said = refused(config_of(tmp_path, QWEN | {"quantization_config": quantisation}), False)
    assert line in said and said.endswith(("int4", "--format int8", "download config.json again"))


def test_quantisations_that_are_named_elsewhere(tmp_path: Path) -> None:
    config_of(tmp_path, QWEN | {"quantization": {"bits": 4, "group_size": 64, "mode": "affine"}})
    assert "(MLX, 4 bits)" in refused(tmp_path, False)
    config_of(tmp_path, QWEN)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "INT4_AWQ"}}))
    assert "the modelopt quant_algo 'INT4_AWQ'" in refused(tmp_path, False)


@pytest.mark.parametrize(
    "quantisation",
    [
        {"quant_method": "fp8", "activation_scheme": "static"},
        {"quant_method": "gptq", "bits": 4, "desc_act": True},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {
            "group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
        }},
    ],
)  # fmt: skip
def test_quantisations_that_sound_unusual_are_taken(quantisation: dict[str, Any], tmp_path: Path) -> None:
    source = open_source(config_of(tmp_path, QWEN | {"quantization_config": quantisation}), weights=False)
    assert source.method is not None and source.method.name == quantisation["quant_method"]


def test_a_quantisation_in_a_file_of_its_own_is_taken(tmp_path: Path) -> None:
    config_of(tmp_path, QWEN)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    source = open_source(tmp_path, weights=False)
    assert source.method is not None and source.method.name == "modelopt"


CONFIG = {"config.json": json.dumps(QWEN)}


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (
            {"adapter_config.json": LORA, "adapter_model.safetensors": "x"},
            "an adapter (LoRA), no model, and adapters are",
        ),
        (CONFIG | {"adapter_config.json": LORA, "adapter_model.safetensors": "x"}, "merge it into its model"),
        (
            CONFIG | {"onnx/model.onnx": "x"},
            "has the model as ONNX, which is not read; take the one with *.safetensors",
        ),
        ({"genai_config.json": "{}", "model.onnx": "x"}, "has the model as ONNX"),
        (CONFIG | {"pytorch_model-00001-of-00002.bin": "x"}, "only pickled weights (.bin, .pt), which can run code"),
        (CONFIG | {"tf_model.h5": "x"}, "only weights for TensorFlow or Flax; take the checkpoint with *.safetensors"),
        ({"consolidated.00.pth": "x", "params.json": "{}"}, "only pickled weights"),
        ({"model_index.json": "{}", "unet/config.json": "{}"}, "makes pictures (model_index.json): it is no language"),
        ({"snapshot/config.json": "{}"}, "is not a model folder: it has no config.json; its folder 'snapshot' has one"),
        ({"tokenizer.json": "{}"}, "is not a model folder: it has no config.json"),
        ({}, "is not a model folder: it has no config.json"),
    ],
)
def test_folders_that_hold_something_else(files: dict[str, str], line: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert line in refused(tmp_path, True)


def test_a_file_of_a_model_folder(tmp_path: Path) -> None:
    file = config_of(tmp_path, QWEN) / "model.safetensors"
    file.write_text("x")
    assert refused(file, True) == f"--model: '{file}' is not a folder; give its folder: --model {tmp_path}"


@pytest.mark.parametrize("beside", [True, False])
def test_the_package_for_gguf_is_named(beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = build_gguf("llama, Q4_0 and Q8_0", tmp_path)
    if not beside:
        (pair.published.parent / "config.json").unlink()
    monkeypatch.setitem(sys.modules, "gguf", None)
    line = refused(pair.published, True)
    assert line == f"{pair.published}: GGUF files need the gguf package: pip install gguf"


@pytest.mark.parametrize(
    "module", ["compressed_tensors", "bitsandbytes", "auto_gptq", "gptqmodel", "awq", "modelopt", "kernels"]
)
def test_published_formats_need_no_package(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for method in ("compressed-tensors", "gptq", "awq", "fp8", "mxfp4", "modelopt"):
        source = open_source(
            config_of(tmp_path, QWEN | {"quantization_config": {"quant_method": method}}), weights=False
        )
        assert source.method is not None and source.method.name == method


def test_tiktoken_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offload.model.tokenizers import load_tokenizer

    monkeypatch.setitem(sys.modules, "tiktoken", None)
    build_tiny("qwen3_moe", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tiktoken.model").write_text("YQ== 0\nYg== 1\nYWI= 2\n")
    assert load_tokenizer(tmp_path)("abab").input_ids == [2, 2]
