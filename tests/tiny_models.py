"""Tiny random checkpoints of many Mixture-of-Experts architectures, with the real structure of each.

Every architecture of :data:`TINY_ARCHITECTURES` is behind transformers' experts interface and has a text-only causal
language model. They were picked to differ: per-expert and fused checkpoint tensors, transposed and interleaved
layouts, biases, no gate, own gate functions, dense first layers, shared experts, and plain, latent, sliding, recurrent
and hybrid attention. Weights are large enough that one corrupted expert changes the logits visibly.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from offload.model.families.names import known_model_type

known_model_type({"model_type": "grok-1"})  # transformers has no class for it: ours
VOCAB_SIZE = 320
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
_LAYERS = 4
_LATENT_ATTENTION = {"num_key_value_heads": 4, "head_dim": 8}

# One pool of fields: a config class takes those that it knows, whatever it calls its number of experts.
_COMMON: dict[str, Any] = {
    "num_hidden_layers": _LAYERS, "hidden_size": 64, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 512,
    "pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "tie_word_embeddings": False,
    # experts
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "top_k_experts": 2, "moe_topk": 2, "moe_k": 2,
    "intermediate_size": 48, "moe_intermediate_size": 32, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 48,
    "shared_expert_intermediate_size": 48, "shared_intermediate_size": 48, "moe_shared_expert_intermediate_size": 48,
    "n_shared_experts": 1, "moe_num_shared_experts": 1, "num_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "first_num_dense_layers": 1, "num_dense_layers": 1,
    "moe_layer_start_index": 1, "num_nextn_predict_layers": 0, "dense_intermediate_size": 48,
    # attention
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8,
    "kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "o_lora_rank": 16, "o_groups": 2, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "swa_v_head_dim": 16,
    # recurrent layers
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_head_dim": 16, "linear_num_heads": 4, "chunk_size": 16, "use_mamba_kernels": False,
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 8, "mamba_n_heads": 4,
    "mamba_d_head": 32, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
}  # fmt: skip
_HYBRID = ["linear_attention", "full_attention"] * 2
_DENSE_FIRST = ["dense"] + ["sparse"] * (_LAYERS - 1)

# What an architecture wants on top of the pool, or instead of it.
_OWN: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {"tie_word_embeddings": True},
    "qwen3_next": {"layer_types": _HYBRID},
    "olmoe": {},
    "deepseek_v2": _LATENT_ATTENTION,
    "deepseek_v3": _LATENT_ATTENTION | {"n_group": 2},
    "gpt_oss": {},
    "glm4_moe": {},
    "minimax_m2": {},
    "granitemoe": {},
    "phimoe": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h": {
        "num_hidden_layers": 7,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "linear_attention", "moe", "mlp"],
    },
    "kimi_linear": _LATENT_ATTENTION | {"layer_types": _HYBRID, "q_lora_rank": None},
    "ernie4_5_moe": {},
    "qwen3_5_moe": {"layer_types": _HYBRID},
    "qwen3_5_moe_text": {"layer_types": _HYBRID},
    "gemma4_text": {"enable_moe_block": True, "global_head_dim": 16, "hidden_size_per_layer_input": 0},
    "aria_text": {},
    "hy_v4": {},
    "deepseek_v4": {},
    "deepseek_v32": _LATENT_ATTENTION | {"mlp_layer_types": _DENSE_FIRST},
    "beam": {"mlp_layer_types": _DENSE_FIRST},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "inkling2_text": {},
    "minimax_m3_vl_text": {},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "bailing_hybrid": _LATENT_ATTENTION | {"layer_types": _HYBRID},
    "cohere2_moe": {"logit_scale": 1.0},
    "hunyuan_v1_moe": {},
    "mimo_v2_flash": {},
    "afmoe": {},
    "laguna": {},
    "grok-1": {"tie_word_embeddings": True, "embedding_multiplier_scale": 8.0, "attn_output_multiplier": 0.25},
    # not behind the experts interface
    "llama4_text": {
        "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "moe_layers": [1, 3], "no_rope_layers": [1, 0, 1, 1],
        "attention_chunk_size": 8,
    },
    "longcat_flash": {
        "num_layers": 2, "zero_expert_num": 4, "moe_topk": 3, "qk_head_dim": 24, "head_dim": 8,
        "num_key_value_heads": 4,
    },
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "jetmoe": {"kv_channels": 16, "num_key_value_heads": 2},
}  # fmt: skip
TINY_ARCHITECTURES: tuple[str, ...] = tuple(_OWN)

# Much like those above: each of these has one test, not all.
_FURTHER: dict[str, dict[str, Any]] = {
    "axk1": _LATENT_ATTENTION,
    "axk2": _LATENT_ATTENTION,
    "dots1": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {},
    "glm4_moe_lite": _LATENT_ATTENTION,
    "glm_moe_dsa": _LATENT_ATTENTION,
    "granitemoe_swa": {},
    "granitemoeshared": {},
    "hy_v3": {},
    "kolibri1": {},
    "mellum": {},
    "solar_open": {},
    "dots3_note_text": {
        "num_key_value_heads": 4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 16, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
    },
}  # fmt: skip
FURTHER_ARCHITECTURES: tuple[str, ...] = tuple(_FURTHER)

# Checkpoints that hold more than a text model: all of it must be left out. A name is the class of the text where the
# checkpoint's own class leaves that open; fields are those of the text.
_WHOLE: dict[str, str | dict[str, Any]] = {
    "qwen3_5_moe": {"layer_types": _HYBRID},
    "llama4": "llama4_text",
    "qwen3_vl_moe": {},
    "kimi_k25": "deepseek_v3",
    "mistral3": "mistral4",
    "mistral_large4": _LATENT_ATTENTION,
    "step3p7": {
        "swiglu_limits": [0.0, 0.0, 0.0, 0.02], "mlp_layer_types": _DENSE_FIRST,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "aria": "aria_text",
    "gemma4": "gemma4_text",
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        },
    },
    "glm5_next": {
        "num_key_value_heads": 4, "qk_rope_head_dim": 0, "head_dim": 0,
        "layer_types": ["linear_attention", "deepseek_sparse_attention"] * 2,
    },
    "inkling2": "inkling2_text",
    "internvl": "qwen3_moe",
    "minimax_m3_vl": "minimax_m3_vl_text",
    "muse_spark": {"moe_hidden_size": 64},
    "qwen3_omni_moe_thinker": {},
    "qwen4_exp": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
        "indexer_compress_ratio": 4, "hc_lowrank": 8, "ngram_vocab_size_base": 200, "split_ngram_parts": 2,
        "heads_per_ngram": 2, "layer_types": _HYBRID, "output_gate_type": "sigmoid",
    },
    "unlimited_ocr": {},
}  # fmt: skip
MULTIMODAL: tuple[str, ...] = tuple(_WHOLE)
_TEXTS: dict[str, dict[str, Any]] = _OWN | _FURTHER | {"mistral4": _LATENT_ATTENTION}

# One pool of fields for what is not text, and what some want instead of it.
_OTHER: dict[str, Any] = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "num_attention_heads": 2,
    "out_hidden_size": 64, "num_position_embeddings": 16, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "num_key_value_heads": 2, "head_dim": 16,
    "deepstack_visual_indexes": [0], "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32,
    "text_hidden_size": 64, "pos_emb_height": 4, "pos_emb_width": 4, "encoder_layers": 1, "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "d_model": 32, "output_dim": 64, "downsample_hidden_size": 16, "position_embedding_size": 64,
}  # fmt: skip
_PARTS: dict[tuple[str, str], dict[str, Any]] = {
    ("muse_spark", "audio_config"): {"patch_sizes": [2], "hidden_sizes": [16], "depths": [1], "out_hidden_size": 64},
    ("unlimited_ocr", "vision_config"): {
        "sam_config": {
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_channels": 16, "mlp_dim": 32,
            "downsample_channels": [16, 32], "image_size": 64, "global_attn_indexes": [0],
        },
        "encoder_config": {
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
            "image_size": 64, "patch_size": 16,
        },
    },
}  # fmt: skip

_SPECIAL_TOKENS = ("<|endoftext|>", "<s>", "<|im_end|>", "<|im_start|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TOKENIZER_TEXT = (
    "the expert that the router picks is loaded from the disk into a slot and stays there until the policy evicts it",
    "what is the capital of France? Paris is the capital of France, and the Seine runs through the middle of it",
    "a hit is a record that is ready, a pending is on its way, and a miss is neither of them; other words confuse us",
)


def tiny_config(model_type: str, sizes: dict[str, Any] | None = None) -> PreTrainedConfig:
    """The config of a tiny ``model_type``: 4 layers, hidden size 64, 8 experts of which 2 are picked (``zaya``: 1).

    ``sizes`` replaces fields of the text config.
    """
    whole = CONFIG_MAPPING[model_type]
    if model_type not in _WHOLE:
        return _filled(whole, _COMMON, _TEXTS[model_type] | (sizes or {}))
    parts: dict[str, Any] = {}
    for name, part in whole.sub_configs.items():
        if name == "text_config":
            text = _WHOLE[model_type]
            cls, own = (CONFIG_MAPPING[text], _TEXTS[text]) if isinstance(text, str) else (part, text)
            parts[name] = _filled(cls, _COMMON, own | (sizes or {})).to_dict()
        else:
            cls = CONFIG_MAPPING["siglip_vision_model"] if part.__name__ == "AutoConfig" else part
            parts[name] = _filled(cls, _OTHER, _PARTS.get((model_type, name), {})).to_dict()
    # other ids than these would be those of tokens that the text has
    marks = (field.name for field in fields(whole) if field.name.endswith(("_token_id", "_token_index")))
    more = (
        {"projector_hidden_size": 32} if any(field.name == "projector_hidden_size" for field in fields(whole)) else {}
    )
    return whole(**parts, **{name: 4 + number for number, name in enumerate(marks)}, **more)


def _filled(cls: Any, pool: dict[str, Any], own: dict[str, Any]) -> PreTrainedConfig:
    """A config with ``own`` fields and those of ``pool`` that its class knows."""
    known = {field.name for field in fields(cls)} | set(cls.attribute_map)
    return cls(**{key: value for key, value in pool.items() if key in known} | own)


def build_tiny(
    model_type: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "200KB",
    tokenizer: bool = True,
    sizes: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of random weights with stock ``save_pretrained`` and return ``folder``.

    ``seed`` fixes every weight, ``sizes`` is for :func:`tiny_config`. ``max_shard_size`` is small by default, so that
    the checkpoint has several shards.
    With ``tokenizer`` a byte-level tokenizer of exactly ``VOCAB_SIZE`` tokens with a chat template is written too.
    """
    config = tiny_config(model_type, sizes)
    elsewhere = model_type in _WHOLE or model_type == "mistral4"  # which transformers files under those with images
    auto = AutoModelForImageTextToText if elsewhere else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=dtype, experts_implementation="eager").eval()
    _randomise(model, torch.Generator().manual_seed(seed))
    model.generation_config = GenerationConfig(
        eos_token_id=EOS_ID, pad_token_id=PAD_ID, bos_token_id=BOS_ID, do_sample=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        save_tiny_tokenizer(folder)
    return folder


def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Fill matrices with noise and move vectors (norms, biases, sinks, decay rates) off their neutral values."""
    seen: set[int] = set()

    def noise(tensor: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator).mul_(scale).to(tensor.dtype)

    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.data_ptr() in seen:  # tied weights appear under two names
                continue
            seen.add(tensor.data_ptr())
            if name.endswith("tid2eid"):  # a table from token id to expert ids: any distinct pair is legal
                experts = torch.rand(tensor.shape[0], 8, generator=generator).argsort(dim=-1)
                tensor.copy_(experts[:, : tensor.shape[1]])
            elif not tensor.is_floating_point():
                continue
            elif name.endswith("balancing_biases"):  # the id after the last expert ("skip") must be picked sometimes
                tensor.copy_(noise(tensor, 0.05))
            elif ".router_mlp." in name and tensor.ndim >= 2:  # three layers deep: small weights would pick one expert
                tensor.copy_(noise(tensor, 0.6))
            elif "bias" in name.rsplit(".", 1)[-1]:  # also fused per-expert biases and the routers' correction biases
                tensor.add_(noise(tensor, 0.05))
            elif tensor.ndim >= 2:
                tensor.copy_(noise(tensor, 0.08))
            else:
                tensor.add_(noise(tensor, 0.1))


def save_tiny_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer (4 special tokens, 256 bytes, 60 merges) with a ChatML-like template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TOKENIZER_TEXT, trainer)
    pad, bos, end, start = _SPECIAL_TOKENS
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=end, additional_special_tokens=[start]
    )
    wrapped.chat_template = _CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def reference_logits(
    folder: Path,
    ids: torch.Tensor,
    decode_ids: list[int],
    attn_implementation: str | None = None,
    whole: bool = False,
) -> list[torch.Tensor]:
    """Logits of the stock model with ``eager`` experts: of the prompt, then of each decode step.

    ``ids`` is int64 ``[B, T]``; every row is continued with the same ``decode_ids``, one step each, on a
    ``DynamicCache``. Returns ``[B, T, vocab]`` followed by ``len(decode_ids)`` tensors ``[B, 1, vocab]``.
    """
    model = load_reference(folder, attn_implementation, whole)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    steps = [ids] + [torch.full((ids.shape[0], 1), token, dtype=torch.long) for token in decode_ids]
    with torch.inference_mode():
        return [model(input_ids=step, past_key_values=cache, use_cache=True).logits for step in steps]


def load_reference(folder: Path, attn_implementation: str | None = None, whole: bool = False) -> PreTrainedModel:
    """The stock causal language model in ``folder`` with ``eager`` experts, in the checkpoint's dtype, in eval mode.

    ``whole``: of a multimodal checkpoint, the class that takes images too.
    ``attn_implementation`` None leaves the choice to transformers. Stock loading maps the file and leaves weights at
    any multiple of 8 bytes, and kernels may round differently by address, so they are copied to where torch puts its
    own tensors: without that the stock model does not even equal a copy of itself.
    """
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    auto = AutoModelForImageTextToText if whole else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype="auto", experts_implementation="eager", **extra)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()
