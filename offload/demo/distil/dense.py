"""The dense model as transformers runs it: the teacher's reference, and the author of the chat text."""

from __future__ import annotations

from typing import Any

import torch

from offload.demo.gguf_dense import DenseModel


def dense_transformers_model(dense: DenseModel) -> Any:
    """Return a transformers `LlamaForCausalLM` in bf16 that shares the tensors of `dense`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = dense.config
    config = LlamaConfig(
        vocab_size=c.vocab,
        hidden_size=c.hidden,
        intermediate_size=c.ffn,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        max_position_embeddings=c.context,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(dense.tensors, strict=False, assign=True)
    model.tie_weights()
    # Buffers are not in the state dict; the rotary table must be made on the CPU.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.eval()
