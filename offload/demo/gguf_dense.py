"""The dense model behind the demo: a 4-bit GGUF file read into bf16 tensors with the names that transformers uses.

The GGUF layout is that of llama.cpp's converter: it interleaves the two rotary halves of each attention head, so the
q and k projections are permuted back here (`LlamaModel.permute` in llama.cpp's `convert_hf_to_gguf.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload.demo.errors import DemoBuildError

_LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class DenseConfig:
    """Sizes of a dense Llama model; `rope_theta` and `norm_eps` as in its config file."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rope_theta: float
    norm_eps: float


@dataclass
class DenseModel:
    """A dense Llama model.

    `tensors` maps transformers' names (`model.layers.0.mlp.up_proj.weight`, ...) to bf16 tensors `[out, in]`, norms
    `[hidden]`. The output head is tied to `model.embed_tokens.weight` and has no entry of its own.
    """

    config: DenseConfig
    tensors: dict[str, Tensor]


def open_gguf(path: Path) -> Any:
    """Open a GGUF file with the `gguf` package's reader (parsing the vocabulary takes it seconds: open once).

    Raises `DemoBuildError` if the package is missing or the file damaged.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise DemoBuildError(
            "the demo model needs the package 'gguf': install it with  pip install 'run-local[demo]'"
        ) from error
    try:
        return GGUFReader(str(path))
    except Exception as error:  # the reader raises whatever numpy or struct met in a damaged file
        raise DemoBuildError(f"{path.name} is not a readable GGUF file: {error}") from error


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row permutation of a q or k projection `[heads * head_dim, in]`."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def gguf_field(reader: Any, key: str) -> Any:
    """Return the value of a metadata field; raises `DemoBuildError` if there is none."""
    entry = reader.fields.get(key)
    if entry is None:
        raise DemoBuildError(f"the GGUF file has no field {key}: it is damaged or of another model")
    return entry.contents()


def read_dense(reader: Any, on_layer: Callable[[int, int], None] | None = None) -> DenseModel:
    """Turn an opened Llama GGUF file with a tied head into a `DenseModel`.

    `on_layer(done, total)` is called after each layer. Raises `DemoBuildError` if the file is damaged or of another
    architecture.
    """
    from gguf import dequantize

    def field(key: str) -> Any:
        return gguf_field(reader, key)

    if field("general.architecture") != "llama":
        raise DemoBuildError(f"the GGUF file holds a {field('general.architecture')} model, a llama model is needed")
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    if "output.weight" in by_name:
        raise DemoBuildError("the GGUF file has an untied output head, which the demo model does not expect")
    heads, kv_heads = int(field("llama.attention.head_count")), int(field("llama.attention.head_count_kv"))
    hidden = int(field("llama.embedding_length"))

    def get(name: str, permuted_heads: int = 0) -> Tensor:
        tensor = by_name.get(name)
        if tensor is None:
            raise DemoBuildError(f"the GGUF file has no tensor {name}: it is damaged or of another model")
        # np.array copies: the file's memory map is read-only, which torch does not accept
        values = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if permuted_heads:
            values = unpermute(values, permuted_heads)
        return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": get("token_embd.weight"), "model.norm.weight": get("output_norm.weight")}
    layers = int(field("llama.block_count"))
    for layer in range(layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        tensors[ours + "input_layernorm.weight"] = get(theirs + "attn_norm.weight")
        tensors[ours + "post_attention_layernorm.weight"] = get(theirs + "ffn_norm.weight")
        for name, other in _LINEARS.items():
            permuted = {"attn_q": heads, "attn_k": kv_heads}.get(other, 0)
            tensors[f"{ours}{name}.weight"] = get(f"{theirs}{other}.weight", permuted)
        if on_layer is not None:
            on_layer(layer + 1, layers)
    config = DenseConfig(
        layers=layers,
        hidden=hidden,
        ffn=int(field("llama.feed_forward_length")),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocab=tensors["model.embed_tokens.weight"].shape[0],
        context=int(field("llama.context_length")),
        rope_theta=float(field("llama.rope.freq_base")),
        # GGUF stores the epsilon as float32; seven digits bring back the number that was meant.
        norm_eps=float(f"{float(field('llama.attention.layer_norm_rms_epsilon')):.7g}"),
    )
    return DenseModel(config, tensors)
