"""Tiny checkpoints quantised as models are published, and the same ones with the weights dequantised.

The encoders and decoders here are written from the formats' descriptions, apart from those that run-local has.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
}


def build_published(name: str, folder: Path) -> Pair:
    return publish(FORMATS[name], folder)
