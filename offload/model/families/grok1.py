"""Grok-1, which transformers has no class for: its model on transformers' building blocks.

Written from what xAI's JAX code does (``model.py`` and ``run.py`` of xai-org/grok-1). Tensors go by the names of the
community's conversion (hpcai-tech/grok-1), whose config this reads. What differs from Mixtral:

- embeddings are multiplied by ``embedding_multiplier_scale``, logits by ``output_multiplier_scale``;
- attention scores are multiplied by ``attn_output_multiplier`` and squeezed into +-``max_attn_value`` by a tanh, in
  float32;
- each of the two blocks of a layer has a norm behind it, too, before its output is added;
- a norm scales in float32 before it rounds;
- the router works in float32 and does not renormalise the probabilities of the chosen experts;
- experts gate with GELU in its tanh form (JAX's default; the conversion's own code takes the exact form).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding, apply_rotary_pos_emb, repeat_kv

from offload.model.transformers_api import use_experts_implementation
from offload.model.transformers_weights import register_layout

MODEL_TYPE = "grok-1"
ALL_ATTENTION_FUNCTIONS = AttentionInterface()


class Grok1Config(PreTrainedConfig):
    """Defaults are those of the published model (314 B weights)."""

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ("past_key_values",)
    default_theta = 10000.0

    vocab_size: int = 131072
    hidden_size: int = 6144
    intermediate_size: int = 32768
    num_hidden_layers: int = 64
    num_attention_heads: int = 48
    num_key_value_heads: int = 8
    num_experts: int = 8
    num_experts_per_tok: int = 2
    attn_output_multiplier: float = 0.08838834764831845
    max_attn_value: float = 30.0
    embedding_multiplier_scale: float = 78.38367176906169
    output_multiplier_scale: float = 0.5773502691896257
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    hidden_act: str = "gelu_pytorch_tanh"
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True
    rope_parameters: dict[str, Any] | None = None


class Grok1RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        states = hidden_states.float()
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * states).to(hidden_states.dtype)


@use_experts_implementation
class Grok1Experts(nn.Module):
    """All experts of a layer, as transformers' experts interface wants them."""

    def __init__(self, config: Grok1Config) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(
            torch.empty(config.num_experts, 2 * config.intermediate_size, config.hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.intermediate_size))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The ``eager`` way. ``hidden_states`` [T, H], the others [T, k] -> [T, H]."""
        total = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            position, token = torch.where(top_k_index.t() == expert)
            states = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert])
            gate, up = states.chunk(2, dim=-1)
            states = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            total.index_add_(0, token, states * top_k_weights[token, position, None])
        return total


class Grok1Router(nn.Module):
    def __init__(self, config: Grok1Config) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, H] -> weights in the states' dtype and ids of the chosen experts, [T, k] each."""
        scores = nn.functional.linear(hidden_states.float(), self.weight.float())
        chosen, ids = torch.topk(scores.softmax(-1), self.top_k, dim=-1)
        return chosen.to(hidden_states.dtype), ids


class Grok1MoeBlock(nn.Module):
    def __init__(self, config: Grok1Config) -> None:
        super().__init__()
        self.gate = Grok1Router(config)
        self.experts = Grok1Experts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        states = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, ids = self.gate(states)
        output: torch.Tensor = self.experts(states, ids, weights)
        return output.reshape(hidden_states.shape)


def eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    softcap: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``query`` [B, heads, T, width], the others [B, shared heads, keys, width] -> [B, T, heads, width]."""
    groups = module.num_key_value_groups
    scores = torch.matmul(query, repeat_kv(key, groups).transpose(2, 3)).float() * scaling
    scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1).to(query.dtype)
    return torch.matmul(weights, repeat_kv(value, groups)).transpose(1, 2).contiguous(), weights


class Grok1Attention(nn.Module):
    def __init__(self, config: Grok1Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True
        shared = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.config.attn_output_multiplier,
            softcap=self.config.max_attn_value,
            **kwargs,
        )
        attended: torch.Tensor = self.o_proj(output.reshape(hidden_states.shape))
        return attended


class Grok1DecoderLayer(nn.Module):
    def __init__(self, config: Grok1Config, layer_idx: int) -> None:
        super().__init__()
        self.attn = Grok1Attention(config, layer_idx)
        self.moe_block = Grok1MoeBlock(config)
        self.pre_attn_norm, self.post_attn_norm, self.pre_moe_norm, self.post_moe_norm = (
            Grok1RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(4)
        )

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden_states = hidden_states + self.post_attn_norm(self.attn(self.pre_attn_norm(hidden_states), **kwargs))
        return hidden_states + self.post_moe_norm(self.moe_block(self.pre_moe_norm(hidden_states)))


class Grok1PreTrainedModel(PreTrainedModel):
    config_class = Grok1Config
    base_model_prefix = "model"
    _no_split_modules = ("Grok1DecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Grok1Experts | Grok1Router):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=self.config.initializer_range)


class Grok1Model(Grok1PreTrainedModel):
    def __init__(self, config: Grok1Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(Grok1DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = Grok1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MixtralRotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """``input_ids`` [B, T]; ``last_hidden_state`` of the result is [B, T, H]."""
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        states = self.embed_tokens(input_ids) * self.config.embedding_multiplier_scale
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(states.shape[1], device=states.device)[None] + seen
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotations = self.rotary_emb(states, position_ids=position_ids)
        for layer in self.layers:
            states = layer(
                states,
                position_embeddings=rotations,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(states), past_key_values=past_key_values)


class Grok1ModelForCausalLM(Grok1PreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - as transformers declares it

    def __init__(self, config: Grok1Config) -> None:
        super().__init__(config)
        self.model = Grok1Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int | torch.Tensor = 0, **kwargs: Any) -> Any:
        """``logits`` of the result are [B, kept, V]: of the last ``logits_to_keep`` positions (0: all), or of those."""
        outputs = self.model(input_ids, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept]) * self.config.output_multiplier_scale
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)


def register() -> None:
    """Make the family known to transformers' Auto classes, and its checkpoints' tensor names. Again does nothing."""
    AutoConfig.register(MODEL_TYPE, Grok1Config, exist_ok=True)
    AutoModelForCausalLM.register(Grok1Config, Grok1ModelForCausalLM, exist_ok=True)
    register_layout(MODEL_TYPE, "moe_block.experts", ("linear", "linear_v", "linear_1"), {"norm.scale": "norm.weight"})
