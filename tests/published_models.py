"""Tiny checkpoints quantised as models are published, and the same ones with the weights dequantised.

The encoders and decoders here are written from the formats' descriptions, apart from those that run-local has.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from offload.checkpoint.model_folder import INDEX_FILE
from tests.tiny_models import build_tiny


class Published(NamedTuple):
    """``parts`` stand in the checkpoint for a weight; ``weight`` is what they stand for, in the weight's dtype."""

    parts: dict[str, torch.Tensor]
    weight: torch.Tensor


Publish = Callable[[str, torch.Tensor], "Published | None"]
"""(name, weight) -> how it is published; None: as it is."""


class Pair(NamedTuple):
    """Folders of a quantised checkpoint and of an unquantised one with the same weights."""

    published: Path
    reference: Path


class Format(NamedTuple):
    """``config`` is the ``quantization_config``, ``sizes`` replaces fields of the tiny config."""

    architecture: str
    quantise: Publish
    config: dict[str, Any]
    sizes: dict[str, Any] | None = None
    dtype: torch.dtype = torch.bfloat16


def publish(form: Format, folder: Path) -> Pair:
    plain = build_tiny(form.architecture, folder / "plain", dtype=form.dtype, sizes=form.sizes)
    pair = Pair(folder / "published", folder / "reference")
    tensors = {}
    for file in sorted(plain.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (plain / INDEX_FILE).unlink(missing_ok=True)
    published, reference = {}, {}
    for name, weight in tensors.items():
        found = form.quantise(name, weight)
        published |= {name: weight} if found is None else found.parts
        reference[name] = weight if found is None else found.weight
        assert reference[name].shape == weight.shape
    for target, held in ((pair.published, published), (pair.reference, reference)):
        shutil.copytree(plain, target)
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, target / "model.safetensors")
    said = json.loads((plain / "config.json").read_text())
    (pair.published / "config.json").write_text(json.dumps(said | {"quantization_config": form.config}))
    shutil.rmtree(plain)
    return pair


def is_linear(name: str) -> bool:
    """Whether a tensor is the weight of a linear layer that quantisers take: no router, embedding, head or norm."""
    return name.endswith("_proj.weight") or name.endswith(
        ("_a_proj_with_mqa.weight", ".w1.weight", ".w2.weight", ".w3.weight")
    )


# --- FP8 with scales for blocks

FP8_BLOCK = 32


def fp8_config(**more: Any) -> dict[str, Any]:
    return {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    } | more  # fmt: skip


def fp8(name: str, weight: torch.Tensor, left_out: tuple[str, ...] = ()) -> Published | None:
    """The last blocks of rows and columns may be smaller."""
    if not is_linear(name) or any(part in name for part in left_out):
        return None
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    back = torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(i * FP8_BLOCK, (i + 1) * FP8_BLOCK), slice(j * FP8_BLOCK, (j + 1) * FP8_BLOCK)
            scales[i, j] = weight[here].float().abs().max() / 448
            codes[here] = (weight[here].float() / scales[i, j]).to(torch.float8_e4m3fn)
            back[here] = codes[here].float() * scales[i, j]
    return Published({name: codes, f"{name}_scale_inv": scales}, back.to(weight.dtype))


# --- MXFP4

FP4_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def mxfp4(name: str, weight: torch.Tensor) -> Published | None:
    """``weight`` is [experts, inputs, outputs], and is published the other way round."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return None
    turned = weight.transpose(1, 2).float()
    groups = turned.unflatten(-1, (-1, 32))
    exponent = groups.abs().amax(-1).log2().floor() - 2  # the largest weight is between 4 and 8
    scaled = groups / exponent.exp2()[..., None]
    codes = (scaled.abs()[..., None] - torch.tensor(FP4_VALUES)).abs().argmin(-1)
    back = torch.tensor(FP4_VALUES)[codes] * scaled.sign() * exponent.exp2()[..., None]
    codes = (codes + 8 * (scaled < 0)).to(torch.uint8)
    parts = {f"{name}_blocks": codes[..., 0::2] + 16 * codes[..., 1::2], f"{name}_scales": (exponent + 127).byte()}
    return Published(parts, back.flatten(-2).transpose(1, 2).to(weight.dtype))


# --- NVFP4

NVFP4_GROUP = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group", "symmetric": True}


def nvfp4(name: str, weight: torch.Tensor, divides: bool = False) -> Published | None:
    return nvfp4_matrix(name, weight, divides) if is_linear(name) else None


def nvfp4_matrix(name: str, weight: torch.Tensor, divides: bool) -> Published:
    """16 weights share a scale of 8 bits, which is divided by the matrix's own number or multiplied with it."""
    stem, groups = name.removesuffix(".weight"), weight.float().unflatten(-1, (-1, 16))
    whole = groups.abs().max() / (6 * 448)
    whole = 1 / whole if divides else whole
    largest = groups.abs().amax(-1) / 6
    held = (largest * whole if divides else largest / whole).clamp(min=2.0**-9).to(torch.float8_e4m3fn)
    scale = (held.float() / whole if divides else held.float() * whole)[..., None]
    codes = ((groups / scale).abs()[..., None] - torch.tensor(FP4_VALUES)).abs().argmin(-1)
    back = torch.tensor(FP4_VALUES)[codes] * groups.sign() * scale
    codes = (codes + 8 * (groups < 0)).flatten(-2).to(torch.uint8)
    pairs = codes[:, 0::2] + 16 * codes[:, 1::2]
    if divides:
        parts = {f"{name}_packed": pairs, f"{name}_scale": held, f"{name}_global_scale": whole[None]}
        parts[f"{stem}.input_global_scale"] = torch.tensor([300.0])
    else:
        parts = {
            name: pairs,
            f"{name}_scale": held,
            f"{name}_scale_2": whole,
            f"{stem}.input_scale": torch.tensor(0.01),
        }
    return Published(parts, back.flatten(-2).to(weight.dtype))


def nvfp4_beside_fp8(name: str, weight: torch.Tensor, divides: bool) -> Published | None:
    """Experts in NVFP4, the rest in FP8 with one scale for a matrix."""
    if ".experts." in name:
        return nvfp4(name, weight, divides)
    if not is_linear(name):
        return None
    stem, scale = name.removesuffix(".weight"), weight.float().abs().max() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    parts = {name: codes, f"{name}_scale": scale, f"{stem}.input_scale": torch.tensor(0.01)}
    if name.endswith(("k_proj.weight", "v_proj.weight")):
        parts[f"{stem}.{stem[-6]}_scale"] = torch.tensor(0.02)  # of an 8-bit KV cache
    return Published(parts, (codes.float() * scale).to(weight.dtype))


def modelopt_config(**more: Any) -> dict[str, Any]:
    return {
        "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"weights": NVFP4_GROUP, "input_activations": NVFP4_GROUP, "targets": ["Linear"]}},
    } | more  # fmt: skip


def compressed_nvfp4_config() -> dict[str, Any]:
    fp8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    return {
        "quant_method": "compressed-tensors", "format": "mixed-precision", "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"weights": fp8, "format": "float-quantized", "targets": ["re:.*self_attn.*"]},
            "group_1": {"weights": NVFP4_GROUP, "format": "nvfp4-pack-quantized", "targets": ["re:.*experts.*"]},
        },
        "ignore": ["lm_head"],
    }  # fmt: skip


# --- whole numbers in groups, packed into 32-bit words

INT_GROUP = 32


def pack_words(codes: torch.Tensor, bits: int, order: tuple[int, ...] = ()) -> torch.Tensor:
    """Whole numbers [rows, columns] -> int32 [rows, words]; field i of a word is column ``order[i]`` of its own."""
    fields = 32 // bits
    words = np.zeros((codes.shape[0], codes.shape[1] // fields), dtype=np.uint32)
    for field in range(fields):
        columns = codes[:, (order[field] if order else field) :: fields]
        words |= columns.numpy().astype(np.uint32) << np.uint32(bits * field)
    return torch.from_numpy(words.view(np.int32))


def int_codes(
    weight: torch.Tensor, group_of: torch.Tensor, bits: int, dtype: torch.dtype, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [outputs, inputs], scales and zero points [outputs, groups], and the weights that they stand for."""
    groups = int(group_of.max()) + 1
    low, high = (torch.zeros(len(weight), groups) for _ in range(2))
    for group in range(groups):
        low[:, group] = weight[:, group_of == group].float().amin(1)
        high[:, group] = weight[:, group_of == group].float().amax(1)
    middle = 2 ** (bits - 1)
    if symmetric:
        scale = (torch.maximum(high, -low) / (middle - 1)).to(dtype)
        zero = torch.full_like(low, middle)
    else:
        scale = ((high - low) / (2 * middle - 1)).to(dtype)
        zero = (-low / scale.float()).round().clamp(1, 2 * middle - 1)
    codes = (weight.float() / scale.float()[:, group_of] + zero[:, group_of]).round().clamp(0, 2 * middle - 1)
    back = ((codes - zero[:, group_of]) * scale.float()[:, group_of]).to(dtype).to(weight.dtype)
    return codes, scale, zero, back


def compressed_config(bits: int = 4, symmetric: bool = True) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": INT_GROUP}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    }  # fmt: skip


def compressed(name: str, weight: torch.Tensor, bits: int = 4, symmetric: bool = True) -> Published | None:
    """Experts alone, as Kimi K2 Thinking has it."""
    if not is_linear(name) or ".experts." not in name:
        return None
    group_of = torch.arange(weight.shape[1]) // INT_GROUP
    codes, scale, zero, back = int_codes(weight, group_of, bits, torch.bfloat16, symmetric)
    parts = {f"{name}_packed": pack_words(codes, bits), f"{name}_scale": scale}
    parts[f"{name}_shape"] = torch.tensor([*weight.shape])
    if not symmetric:
        parts[f"{name}_zero_point"] = pack_words(zero.t(), bits).t()
    return Published(parts, back)


def gptq(name: str, weight: torch.Tensor, bits: int = 4, less: int = 1, any_order: bool = True) -> Published | None:
    if not is_linear(name):
        return None
    stem = name.removesuffix(".weight")
    group_of = torch.arange(weight.shape[1], dtype=torch.int32) // INT_GROUP
    if any_order:
        group_of = group_of[torch.randperm(len(group_of), generator=torch.Generator().manual_seed(len(name)))]
    codes, scale, zero, back = int_codes(weight, group_of.long(), bits, torch.float16, symmetric=False)
    parts = {
        f"{stem}.qweight": pack_words(codes, bits).t(),
        f"{stem}.scales": scale.t(),
        f"{stem}.qzeros": pack_words(zero.t() - less, bits),
        f"{stem}.g_idx": group_of,
    }
    return Published(parts, back)


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq(name: str, weight: torch.Tensor) -> Published | None:
    if not is_linear(name):
        return None
    stem = name.removesuffix(".weight")
    group_of = torch.arange(weight.shape[1]) // INT_GROUP
    codes, scale, zero, back = int_codes(weight, group_of, 4, torch.float16, symmetric=False)
    parts = {
        f"{stem}.qweight": pack_words(codes.t(), 4, AWQ_ORDER),
        f"{stem}.scales": scale.t(),
        f"{stem}.qzeros": pack_words(zero.t(), 4, AWQ_ORDER),
    }
    return Published(parts, back)


# --- bitsandbytes

NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def nf4(name: str, weight: torch.Tensor, nested: bool = True) -> Published | None:
    """Blocks of 64 weights; with ``nested`` their scales have 8 bits, in blocks of 256."""
    if not is_linear(name):
        return None
    flat = weight.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    absmax = blocks.abs().amax(1)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    parts = {f"{name}.quant_map": NF4.clone()}
    if nested:
        levels, offset = torch.linspace(-1, 1, 256), float(absmax.mean())
        outer = [part.abs().max() for part in (absmax - offset).split(256)]
        codes = [
            (part[:, None] / size - levels).abs().argmin(1)
            for part, size in zip((absmax - offset).split(256), outer, strict=True)
        ]
        absmax = torch.cat([levels[code] * size + offset for code, size in zip(codes, outer, strict=True)])
        parts |= {f"{name}.absmax": torch.cat(codes).byte(), f"{name}.nested_absmax": torch.stack(outer)}
        parts[f"{name}.nested_quant_map"] = levels
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        parts[f"{name}.absmax"] = absmax
    codes4 = (blocks[..., None] / absmax[:, None, None] - NF4).abs().argmin(-1)
    back = (NF4[codes4] * absmax[:, None]).flatten()[: len(flat)].view(weight.shape).to(weight.dtype)
    pairs = codes4.flatten()[: len(flat)].view(-1, 2)
    parts[name] = (pairs[:, 0] * 16 + pairs[:, 1]).byte()[:, None]
    parts[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return Published(parts, back)


# --- all of them

FORMATS = {
    "fp8": Format("deepseek_v3", fp8, fp8_config()),
    "fp8, some left out": Format(
        "qwen3_moe",
        lambda name, weight: fp8(name, weight, ("self_attn.v_proj", "layers.2.")),
        fp8_config(modules_to_not_convert=["lm_head", "model.layers.2"]),
    ),
    "fp8, other names": Format("minimax_m2", fp8, fp8_config()),
    "mxfp4": Format(
        "gpt_oss",
        mxfp4,
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
        {"intermediate_size": 96},
    ),
    "nvfp4": Format("qwen3_moe", nvfp4, modelopt_config()),
    "nvfp4 and fp8": Format(
        "minimax_m2",
        partial(nvfp4_beside_fp8, divides=False),
        modelopt_config(
            quant_algo="MIXED_PRECISION",
            quantized_layers={
                "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
                "model.layers.0.block_sparse_moe.experts": {"quant_algo": "NVFP4", "group_size": 16},
            },
        ),
    ),
    "nvfp4 of compressed-tensors": Format(
        "deepseek_v3", partial(nvfp4_beside_fp8, divides=True), compressed_nvfp4_config()
    ),
    "compressed int4": Format("deepseek_v3", compressed, compressed_config()),
    "compressed int4, zero points": Format(
        "qwen3_moe", partial(compressed, symmetric=False), compressed_config(symmetric=False)
    ),
    "compressed int8, zero points": Format(
        "qwen3_moe", partial(compressed, bits=8, symmetric=False), compressed_config(8, symmetric=False)
    ),
    "gptq": Format(
        "qwen3_moe",
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": INT_GROUP, "desc_act": True},
        dtype=torch.float16,
    ),
    "gptq v2, 8 bits": Format(
        "mixtral",
        partial(gptq, bits=8, less=0, any_order=False),
        {"quant_method": "gptq", "bits": 8, "group_size": INT_GROUP, "checkpoint_format": "gptq_v2"},
    ),
    "awq": Format("qwen3_moe", awq, {"quant_method": "awq", "bits": 4, "group_size": INT_GROUP, "version": "gemm"}),
    "nf4": Format(
        "qwen3_moe", nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    ),
    "nf4, plain scales": Format(
        "mixtral", partial(nf4, nested=False), {"quant_method": "bitsandbytes", "load_in_4bit": True}
    ),
}


AWQ_SIZES = {"intermediate_size": 64}
"""For families whose experts would else have 48 inputs: one and a half groups."""


def build_published(name: str, folder: Path) -> Pair:
    return publish(FORMATS[name], folder)
