"""Which tensors of a GGUF file make up which parameters of a transformers model.

llama.cpp renames the tensors of a checkpoint, stacks the experts, and changes some values; the names are those of the
``gguf`` package (``tensor_mapping.py``), the changes those of llama.cpp's ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from offload.errors import ModelError
from offload.model import transformers_api as api
from offload.model import transformers_weights as tw

Change = Callable[[torch.Tensor, Any], torch.Tensor]
"""(weight as the file has it, text config) -> weight as the model has it."""


Compose = Callable[..., torch.Tensor]
"""(parts as the file has them) -> weight as the model has it."""


@dataclass(frozen=True)
class Architecture:
    """``changes`` undoes what llama.cpp did, by the end of the parameter's name.

    ``composed`` are parameters that it has taken apart, with the names of the parts and what makes the weight of them.
    """

    model_types: tuple[str, ...]
    changes: Mapping[str, Change] = field(default_factory=dict)
    composed: Mapping[str, tuple[tuple[str, ...], Compose]] = field(default_factory=dict)


def _unpermute(heads: str) -> Change:
    """llama.cpp interleaves the two rotary halves of each head."""

    def change(weight: torch.Tensor, config: Any) -> torch.Tensor:
        halves = weight.unflatten(0, (getattr(config, heads), -1, 2))
        return halves.transpose(1, 2).reshape(weight.shape)

    return change


def _latent_keys_and_values(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Of each head first its keys, [heads, rank, size] in the file, then its values, [heads, size, rank]."""
    return torch.cat([keys.transpose(1, 2), values], 1).flatten(0, 1)


_LATENT = {"self_attn.kv_b_proj.weight": (("attn_k_b.weight", "attn_v_b.weight"), _latent_keys_and_values)}
ARCHITECTURES = {
    "qwen2moe": Architecture(("qwen2_moe",)),
    "qwen3moe": Architecture(("qwen3_moe",)),
    "olmoe": Architecture(("olmoe",)),
    "minimax-m2": Architecture(("minimax_m2",)),
    "deepseek2": Architecture(("deepseek_v2", "deepseek_v3"), composed=_LATENT),
    "llama": Architecture(
        ("mixtral",),
        {
            "q_proj.weight": _unpermute("num_attention_heads"),
            "k_proj.weight": _unpermute("num_key_value_heads"),
        },
    ),
}
"""llama.cpp's names of the architectures whose experts are stacked and whose values are known to be as they say."""


def get_architecture(name: str, model_type: str | None = None) -> Architecture:
    """Raises ModelError, naming those there are, for another one, and if it is not that of ``model_type``."""
    found = ARCHITECTURES.get(name)
    if found is None:
        raise ModelError(
            f"GGUF files of the architecture '{name}' are not supported ({', '.join(ARCHITECTURES)} are); use the "
            "safetensors checkpoint of this model"
        )
    if model_type is not None and model_type not in found.model_types:
        raise ModelError(
            f"the GGUF file has the architecture '{name}', but config.json the model_type '{model_type}' "
            f"(instead of {' or '.join(found.model_types)}); put the original model's config.json beside the file"
        )
    return found


def check_package() -> None:
    """Raises ModelError if the ``gguf`` package, which has the names of the tensors, is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelError("GGUF files need the gguf package: pip install gguf") from error


def name_tensors(
    model: Any, experts: Collection[api.ExpertsModule], architecture: str, names: Collection[str]
) -> tuple[dict[tuple[str, str], tw.TensorSource], dict[str, str]]:
    """Where the experts' parameters are, and ``{parameter of the skeleton: tensor of the file}``.

    Raises ModelError if the file lacks experts. Needs :func:`check_package`.
    """
    import gguf

    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    layers = model.config.get_text_config().num_hidden_layers
    known = gguf.get_tensor_name_map(number, layers)
    elsewhere = {f"{module.path}.{name}" for module in experts for name in module.tensors}
    skeleton = {}
    for parameter in model.state_dict():
        if parameter in elsewhere:
            continue
        asked = parameter.replace("e_score_correction_bias", "e_score_correction.bias")
        found = known.get_name(asked, try_suffixes=(".weight", ".bias"))
        if found in names:
            skeleton[parameter] = found
    sources = {}
    for module in experts:
        for name in module.tensors:
            sources[module.path, name] = _experts_source(module, name, names)
    return sources, skeleton


_PARTS = {
    "gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "up_proj": ("ffn_up_exps",),
    "down_proj": ("ffn_down_exps",),
}


def _experts_source(module: api.ExpertsModule, name: str, names: Collection[str]) -> tw.TensorSource:
    found = {part: f"blk.{module.layer}.{part}.weight" for part in _PARTS.get(name, ())}
    lost = [key for key in found.values() if key not in names]
    if lost or not found:
        what = lost[0] if lost else f"what makes up {module.path}.{name}"
        raise ModelError(f"the GGUF file has no {what}; its experts are not stacked as llama.cpp does it now")
    keys = {part: (key,) for part, key in found.items()}
    return tw.TensorSource(tw.row_joiner(list(found), name) if len(found) > 1 else None, keys)
