"""Tiny checkpoints in Mistral's own layout, and the same ones in transformers'."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from offload.checkpoint.model_folder import INDEX_FILE, MISTRAL_INDEX_FILE
from tests.published_models import NVFP4_GROUP, Pair, nvfp4_matrix
from tests.tiny_models import build_tiny

BLOCK = 32
ROTARY = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.1, "attention_factor": 1.0,
}  # fmt: skip
"""With positions of a test's prompt behind those that yarn and the scaling of queries begin with."""

_NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_a_proj": "attention.wq_a",
    "self_attn.q_a_layernorm": "attention.q_a_norm",
    "self_attn.q_b_proj": "attention.wq_b",
    "self_attn.kv_a_proj_with_mqa": "attention.wkv_a_with_mqa",
    "self_attn.kv_a_layernorm": "attention.kv_a_norm",
    "self_attn.kv_b_proj": "attention.wkv_b",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate": "gate",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.shared_experts.gate_proj": "shared_experts.w1",
    "mlp.shared_experts.down_proj": "shared_experts.w2",
    "mlp.shared_experts.up_proj": "shared_experts.w3",
}
_QUANTISATION: dict[str, dict[str, Any]] = {
    "tensor": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"},
    "block": {
        "quant_method": "compressed_tensors",
        "format": "float-quantized",
        "config_groups": {
            "FP8_BLOCK": {"weights": {"block_structure": [BLOCK, BLOCK], "strategy": "block", "type": "float"}}
        },
    },
    "16": {
        "quant_method": "COMPRESSED_TENSORS",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"NVFP4": {"weights": NVFP4_GROUP, "input_activations": NVFP4_GROUP}},
    },
}
_ENDS = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}


def build_mistral(folder: Path, scales: str | None = None, dtype: torch.dtype = torch.bfloat16) -> Pair:
    """``scales``: FP8 with one for a ``tensor`` or ``block``, NVFP4 with one for ``16``; None: not quantised.

    The reference has what is left.
    """
    sizes = {"rope_parameters": ROTARY, "first_k_dense_replace": 1, "head_dim": 24}
    reference = build_tiny("mistral4", folder / "reference", dtype=dtype, sizes=sizes)
    weights = {}
    for file in sorted(reference.glob("*.safetensors")):
        weights |= load_file(file)
        file.unlink()
    (reference / INDEX_FILE).unlink(missing_ok=True)
    named = {part: weight for name, weight in weights.items() for part, weight in _mistral(name, weight).items()}
    held: dict[str, torch.Tensor] = {}
    for name, weight in named.items():
        if scales is None or re.search(r"norm|\.gate\.|tok_embeddings|output", name):
            held[name] = weight
            continue
        if scales == "16":
            parts, named[name] = nvfp4_matrix(name, weight, divides=True)
        else:
            parts, named[name] = _fp8(name.removesuffix(".weight"), weight, scales)
        held |= parts
    back = {}
    for name, weight in weights.items():
        there = [named[part] for part in _mistral(name, weight)]
        if name.endswith("gate_up_proj"):
            there = [torch.stack([torch.cat(there[i : i + 2]) for i in range(0, len(there), 2)])]
        elif ".experts." in name:
            there = [torch.stack(there)]
        back[name] = there[0].contiguous()
    save_file(back, reference / "model.safetensors")
    own = folder / "own"
    shutil.copytree(reference, own, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(reference / "tokenizer_config.json", own)
    held["vision_encoder.patch_conv.weight"] = torch.zeros(4, 4)  # not read
    half = sorted(held)[: len(held) // 2]
    shards = {
        "consolidated-00001-of-00002.safetensors": {name: held[name].contiguous() for name in half},
        "consolidated-00002-of-00002.safetensors": {n: t.contiguous() for n, t in held.items() if n not in half},
    }
    for file_name, tensors in shards.items():
        save_file(tensors, own / file_name)
    index = {"weight_map": {name: file_name for file_name, tensors in shards.items() for name in tensors}}
    (own / MISTRAL_INDEX_FILE).write_text(json.dumps(index))
    params = params_of(json.loads((reference / "config.json").read_text()))
    params |= {} if scales is None else {"quantization": _QUANTISATION[scales]}
    (own / "params.json").write_text(json.dumps(params))
    return Pair(own, reference)


def _mistral(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor of transformers' as Mistral has it; of experts first by number, then by matrix."""
    if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
        start = f"layers.{name.split('.')[2]}.experts"
        if name.endswith("down_proj"):
            return {f"{start}.{expert}.w2.weight": part for expert, part in enumerate(weight)}
        halves = [(expert, part.chunk(2)) for expert, part in enumerate(weight)]
        return {f"{start}.{e}.{own}.weight": half[i] for e, half in halves for i, own in enumerate(("w1", "w3"))}
    module = name.removesuffix(".weight")
    if module in _ENDS:
        return {f"{_ENDS[module]}.weight": weight}
    _, _, layer, rest = module.split(".", 3)
    return {f"layers.{layer}.{_NAMES[rest]}.weight": weight}


def _fp8(name: str, weight: torch.Tensor, scales: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rows, columns = weight.shape
    step = (rows, columns) if scales == "tensor" else (BLOCK, BLOCK)
    grid = torch.empty(-(-rows // step[0]), -(-columns // step[1]))
    codes, back = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            here = slice(i * step[0], (i + 1) * step[0]), slice(j * step[1], (j + 1) * step[1])
            grid[i, j] = (weight[here].float().abs().max() / 448).bfloat16()
            codes[here] = (weight[here].float() / grid[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
            back[here] = codes[here].float() * grid[i, j]
    kept = grid.bfloat16().squeeze() if scales == "tensor" else grid.bfloat16()
    parts = {f"{name}.weight": codes, f"{name}.qscale_weight": kept, f"{name}.qscale_act": torch.tensor(1.0)}
    return parts, back.to(weight.dtype)


def params_of(config: dict[str, Any]) -> dict[str, Any]:
    rotary = config["rope_parameters"]
    original = rotary["original_max_position_embeddings"]
    return {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "rope_theta": rotary["rope_theta"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "tied_embeddings": False,
        "max_position_embeddings": config["max_position_embeddings"],
        **{
            name: config[name]
            for name in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        },
        "llama_4_scaling": {"original_max_position_embeddings": original, "beta": rotary["llama_4_scaling_beta"]},
        "yarn": {
            "original_max_position_embeddings": original,
            "factor": rotary["factor"],
            "beta": rotary["beta_fast"],
            "alpha": rotary["beta_slow"],
            "apply_scale": False,
        },
        "moe": {
            "num_experts": config["n_routed_experts"],
            "num_experts_per_tok": config["num_experts_per_tok"],
            "expert_hidden_dim": config["moe_intermediate_size"],
            "first_k_dense_replace": config["first_k_dense_replace"],
            "num_shared_experts": config["n_shared_experts"],
            "num_expert_groups": config["n_group"],
            "num_expert_groups_per_tok": config["topk_group"],
            "routed_scale": config["routed_scaling_factor"],
            "route_every_n": 1,
        },
        "vision_encoder": {"image_size": 16},
    }
