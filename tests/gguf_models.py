"""Tiny GGUF files as llama.cpp's converter writes them, and unquantised checkpoints with the same weights.

The names and the changes to the values are written down here once more; the blocks come from the ``gguf`` package, and
where that only decodes, from random bytes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

from offload.checkpoint.model_folder import INDEX_FILE
from tests.published_models import Pair
from tests.tiny_models import build_tiny

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.e_score_correction_bias": "exp_probs_b.bias",
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b", "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp", "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip
_EXPERT = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


class GgufModel(NamedTuple):
    """``kinds`` gives the kind of a tensor by patterns of its GGUF name, the first that matches; else float32."""

    architecture: str
    name: str
    kinds: dict[str, Kind]
    sizes: dict[str, Any]


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As ``LlamaModel.permute`` of llama.cpp's converter."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def gguf_name(name: str) -> tuple[str, int | None]:
    """The name in the file, and the number of the expert."""
    if name in _NAMES:
        return _NAMES[name], None
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    assert match is not None, name
    layer, rest = match.groups()
    if expert := re.fullmatch(r".*experts\.(\d+)\.(\w+)\.weight", rest):
        return f"blk.{layer}.ffn_{_EXPERT[expert[2]]}_exps.weight", int(expert[1])
    if rest in _LAYER:
        return f"blk.{layer}.{_LAYER[rest]}", None
    stem, _, end = rest.rpartition(".")
    return f"blk.{layer}.{_LAYER[stem]}.{end}", None


def encode(weight: np.ndarray, kind: Kind) -> np.ndarray:
    """The blocks of a weight; of kinds that the package cannot encode, random ones of about the right size."""
    try:
        return gguf.quants.quantize(weight, kind)
    except NotImplementedError:
        size, bytes_of = gguf.GGML_QUANT_SIZES[kind]
        random = np.random.default_rng(weight.size)
        blocks = random.integers(0, 256, (*weight.shape[:-1], weight.shape[-1] // size, bytes_of), dtype=np.uint8)
        halves = {"Q6_K": {208: 1e-4}, "Q3_K": {108: 1e-3}, "Q2_K": {80: 5e-3, 82: 5e-3}}
        for place, value in halves.get(kind.name, {0: 2e-4, 2: 1e-3}).items():
            values = (random.uniform(0.5, 1.5, blocks.shape[:-1]) * value).astype(np.float16)
            blocks[..., place : place + 2] = values[..., None].view(np.uint8)
        return blocks.reshape(*weight.shape[:-1], -1)


def publish_gguf(
    model: GgufModel,
    folder: Path,
    describe: Callable[[gguf.GGUFWriter], None] | None = None,
    split_latent: bool = True,
) -> Pair:
    """``published`` is the file; config and tokenizer are beside it, unless ``describe`` writes them into it."""
    plain = build_tiny(model.architecture, folder / "plain", dtype=torch.bfloat16, sizes=model.sizes)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(plain.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (plain / INDEX_FILE).unlink(missing_ok=True)
    held: dict[str, torch.Tensor] = {}
    latent: dict[str, torch.Tensor] = {}
    untouched: dict[str, torch.Tensor] = {}
    stacks: dict[str, dict[int, str]] = {}
    config = build_config(plain)
    for name, weight in tensors.items():
        there, expert = gguf_name(name)
        if model.name == "llama" and re.search(r"attn_[qk]\.", there):
            key = "num_attention_heads" if "attn_q" in there else "num_key_value_heads"
            weight = _permuted(weight, config[key])
        if there.endswith("ffn_gate_inp_shexp.weight"):
            weight = weight[0]
        if there.endswith("attn_kv_b.weight") and split_latent:
            heads = weight.unflatten(0, (config["num_attention_heads"], -1))
            size = config["qk_nope_head_dim"]
            latent[there.replace("kv_b", "k_b")] = heads[:, :size].transpose(1, 2).contiguous()
            latent[there.replace("kv_b", "v_b")] = heads[:, size:].contiguous()
            untouched[name] = weight
            continue
        held[name] = weight
        stacks.setdefault(there, {})[expert or 0] = name
    writer = gguf.GGUFWriter(folder / "model.gguf", model.name)
    writer.add_block_count(config["num_hidden_layers"])
    if describe is not None:
        describe(writer)
    for there, part in latent.items():
        writer.add_tensor(there, part.float().numpy().astype(np.float16), raw_dtype=Kind.F16)
    reference = {name: weight.half().to(weight.dtype) for name, weight in untouched.items()}
    for there, names in stacks.items():
        weights = [held[names[expert]].float().numpy() for expert in sorted(names)]
        weight = np.stack(weights) if "_exps" in there else weights[0]
        kind = next((kind for pattern, kind in model.kinds.items() if re.search(pattern, there)), Kind.F32)
        kind = kind if weight.ndim > 1 else Kind.F32
        blocks = weight.astype(np.float32) if kind is Kind.F32 else encode(weight, kind)
        writer.add_tensor(there, blocks, raw_dtype=kind)
        back = torch.from_numpy(gguf.dequantize(blocks, kind).copy() if kind is not Kind.F32 else blocks.copy())
        for number, expert in enumerate(sorted(names)):
            name = names[expert]
            found = back[number] if "_exps" in there else back
            if model.name == "llama" and re.search(r"attn_[qk]\.", there):
                key = "num_attention_heads" if "attn_q" in there else "num_key_value_heads"
                found = found.reshape(config[key], -1, 2, found.shape[-1]).swapaxes(1, 2)  # permuted back
            reference[name] = found.reshape(tensors[name].shape).to(torch.bfloat16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pair = Pair(folder / "published" / "model.gguf", folder / "reference")
    shutil.copytree(plain, pair.reference)
    save_file({name: tensor.contiguous() for name, tensor in reference.items()}, pair.reference / "model.safetensors")
    if describe is None:
        shutil.copytree(plain, pair.published.parent)
    pair.published.parent.mkdir(exist_ok=True)
    (folder / "model.gguf").rename(pair.published)
    shutil.rmtree(plain)
    return pair


def build_config(folder: Path) -> dict[str, Any]:
    import json

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


K_SIZES = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 3, "num_experts": 4}
GGUF_MODELS = {
    "qwen3moe, as Q4_K_M": GgufModel(
        "qwen3_moe",
        "qwen3moe",
        {
            r"attn_v|blk\.0\.ffn_down_exps|output\.": Kind.Q6_K,
            r"blk\.1\.ffn_down_exps": Kind.Q5_K,
            r"_exps|attn_|token_embd": Kind.Q4_K,
        },
        K_SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": False},
    ),
    "llama, Q4_0 and Q8_0": GgufModel(
        "mixtral",
        "llama",
        {"gate_exps|up_exps": Kind.Q4_0, "_exps|attn_|output|token": Kind.Q8_0},
        {"intermediate_size": 64},
    ),
    "qwen2moe, with a shared expert": GgufModel(
        "qwen2_moe",
        "qwen2moe",
        {"gate_inp": Kind.F32, "_exps|attn_|_shexp": Kind.Q8_0, "token_embd|output": Kind.F16},
        {"shared_expert_intermediate_size": 64},
    ),
    "deepseek2, keys and values apart": GgufModel(
        "deepseek_v3", "deepseek2", {"kv_b": Kind.F16, "_exps|attn_q|shexp|output": Kind.Q8_0}, {}
    ),
    "minimax-m2": GgufModel(
        "minimax_m2", "minimax-m2", {"_exps": Kind.Q5_0, "attn_": Kind.Q8_0}, {"intermediate_size": 32}
    ),
}


def build_gguf(name: str, folder: Path) -> Pair:
    return publish_gguf(GGUF_MODELS[name], folder)
