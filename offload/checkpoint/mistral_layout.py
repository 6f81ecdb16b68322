"""Mistral's own layout: ``params.json`` and ``consolidated*.safetensors``: Mistral Large 3 and Small 4.

The fields and the tensors are those of transformers' ``mistral4`` (latent attention, experts) under other names, and no
tensor is rearranged: rotary embeddings are interleaved in both layouts, unlike Mixtral's. An FP8 checkpoint has
``X.qscale_weight``, one scale for a matrix or one for each block, and ``X.qscale_act``, which products in the model's
dtype do without. Sources: vLLM (``configs/mistral.py`` and ``models/mistral_large_3.py``) and transformers
(``convert_mistral4_weight_to_hf.py``).

They differ in one point. ``apply_scale: false``, which the published models have, means no correction of attention's
magnitude in vLLM; transformers' script writes one all the same. Here it is as in vLLM, which the models' cards use.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from offload.checkpoint.model_folder import MISTRAL_CONFIG, read_json_object
from offload.errors import ModelError
from offload.model import transformers_weights as tw

MODEL_TYPE = "mistral4"
_REMEDY = "take the model in transformers' layout, with config.json"
_FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "v_head_dim": "v_head_dim",
}
_MOE_FIELDS = {
    "num_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "expert_hidden_dim": "moe_intermediate_size",
    "first_k_dense_replace": "first_k_dense_replace",
    "num_shared_experts": "n_shared_experts",
}
_OPTIONAL_MOE_FIELDS = {
    "routed_scale": "routed_scaling_factor",
    "num_expert_groups": "n_group",
    "num_expert_groups_per_tok": "topk_group",
}
_GATED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_NAMES = {
    r"^layers\.": "model.layers.",
    r"^tok_embeddings\.": "model.embed_tokens.",
    r"^norm\.": "model.norm.",
    r"^output\.": "lm_head.",
    r"\.attention_norm\.": ".input_layernorm.",
    r"\.ffn_norm\.": ".post_attention_layernorm.",
    r"\.attention\.wq_a\.": ".self_attn.q_a_proj.",
    r"\.attention\.wq_b\.": ".self_attn.q_b_proj.",
    r"\.attention\.wkv_a_with_mqa\.": ".self_attn.kv_a_proj_with_mqa.",
    r"\.attention\.wkv_b\.": ".self_attn.kv_b_proj.",
    r"\.attention\.wo\.": ".self_attn.o_proj.",
    r"\.attention\.q_a_norm\.": ".self_attn.q_a_layernorm.",
    r"\.attention\.kv_a_norm\.": ".self_attn.kv_a_layernorm.",
    r"\.gate\.weight": ".mlp.gate.weight",
    **{rf"\.feed_forward\.{own}\.": f".mlp.{name}." for own, name in _GATED.items()},
    **{rf"\.shared_experts\.{own}\.": f".mlp.shared_experts.{name}." for own, name in _GATED.items()},
    r"\.experts\.": ".mlp.experts.",
}
"""Parts of the tensors' names, and what transformers has for them, in the order in which they are replaced."""


def read_params(folder: Path) -> PretrainedConfig:
    """The config that ``params.json`` describes, in transformers' fields.

    Raises ModelError for a damaged file, and for a model that is not of the kind that is read here.
    """
    path = folder / MISTRAL_CONFIG
    said = read_json_object(path)
    try:
        return CONFIG_MAPPING[MODEL_TYPE](**_fields(said))
    except ModelError as error:
        raise ModelError(f"{path}: {error}; {_REMEDY}") from error
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        reason = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise ModelError(f"{path} is damaged ({reason}); download it again") from error


def modalities_of_params(folder: Path) -> tuple[str, ...]:
    """What the checkpoint has beside its text model; the config of :func:`read_params` is of the text alone."""
    said = read_json_object(folder / MISTRAL_CONFIG)
    multimodal = said.get("multimodal") or {}
    return ("vision",) if said.get("vision_encoder") or "vision_encoder_args" in multimodal else ()


def use_mistral_names(model: PreTrainedModel) -> None:
    """Tensors of this meta model go by Mistral's names from now on."""
    tw.use_layout(model, "mlp.experts", ("w1", "w3", "w2"), _NAMES)


def _fields(said: Mapping[str, Any]) -> dict[str, Any]:
    moe = said.get("moe")
    if not moe or not said.get("qk_nope_head_dim"):
        kind = "a model without experts" if not moe else "a model without latent attention, such as Mixtral,"
        raise ModelError(f"{kind} is not read in Mistral's own layout")
    if moe.get("route_every_n", 1) != 1 or moe.get("use_load_balancing_bias") or said.get("sliding_window"):
        raise ModelError("it asks for more than transformers' mistral4 does (layers without experts, biases, windows)")
    fields = {name: said[own] for own, name in _FIELDS.items()}
    fields |= {name: moe[own] for own, name in _MOE_FIELDS.items()}
    fields |= {name: moe[own] for own, name in _OPTIONAL_MOE_FIELDS.items() if own in moe}
    fields["rope_parameters"], longest = _rotary(said)
    fields["max_position_embeddings"] = said.get("max_position_embeddings") or said.get("max_seq_len") or longest
    fields["tie_word_embeddings"] = bool(said.get("tied_embeddings"))
    quantisation = said.get("quantization")
    if quantisation:
        fields["quantization_config"] = _quantisation(quantisation)
    if dtype := said.get("dtype") or (quantisation and "bfloat16"):
        fields["dtype"] = dtype
    return fields


def _rotary(said: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """transformers' rope_parameters, and the longest context that they were made for."""
    yarn, scaling = said["yarn"], said["llama_4_scaling"]
    original = int(yarn["original_max_position_embeddings"])
    if int(scaling["original_max_position_embeddings"]) != original:
        raise ModelError("yarn and llama_4_scaling begin at different positions")
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "rope_theta": float(said["rope_theta"]),
        "factor": float(yarn["factor"]),
        "original_max_position_embeddings": original,
        "beta_fast": float(yarn["beta"]),
        "beta_slow": float(yarn["alpha"]),
        "llama_4_scaling_beta": float(scaling["beta"]),
    }
    if yarn.get("apply_scale", True):
        found |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    else:
        found["attention_factor"] = 1.0
    return found, int(original * yarn["factor"])


def _quantisation(said: Mapping[str, Any]) -> dict[str, Any]:
    method = str(said.get("quant_method") or "").lower().replace("_", "-")
    if said.get("qformat_weight") == "fp8_e4m3":
        return {"quant_method": "fp8"}
    if method:
        return {**said, "quant_method": method}
    raise ModelError(f"its quantisation ({said.get('qformat_weight') or said}) is not supported; fp8_e4m3 is")
