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


def publish(
    model_type: str, folder: Path, quantise: Publish, config: dict[str, Any], dtype: torch.dtype = torch.bfloat16
) -> Pair:
    """``config`` is the ``quantization_config``."""
    plain = build_tiny(model_type, folder / "plain", dtype=dtype)
    pair = Pair(folder / "published", folder / "reference")
    tensors = {}
    for file in sorted(plain.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (plain / INDEX_FILE).unlink(missing_ok=True)
    published, reference = {}, {}
    for name, weight in tensors.items():
        found = quantise(name, weight)
        published |= {name: weight} if found is None else found.parts
        reference[name] = weight if found is None else found.weight
        assert reference[name].shape == weight.shape
    for target, held in ((pair.published, published), (pair.reference, reference)):
        shutil.copytree(plain, target)
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, target / "model.safetensors")
    said = json.loads((plain / "config.json").read_text())
    (pair.published / "config.json").write_text(json.dumps(said | {"quantization_config": config}))
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


# --- all of them

FORMATS: dict[str, tuple[str, Publish, dict[str, Any]]] = {  # name -> (architecture, encoder, quantization_config)
    "fp8": ("deepseek_v3", fp8, fp8_config()),
    "fp8, some left out": (
        "qwen3_moe",
        lambda name, weight: fp8(name, weight, ("self_attn.v_proj", "layers.2.")),
        fp8_config(modules_to_not_convert=["lm_head", "model.layers.2"]),
    ),
    "fp8, other names": ("minimax_m2", fp8, fp8_config()),
}


def build_published(name: str, folder: Path) -> Pair:
    architecture, quantise, config = FORMATS[name]
    return publish(architecture, folder, quantise, config)
