"""What touches transformers' private API, with transformers_weights. Written for 5.23; see docs/dependencies.md.

Everything that is not documented upstream and may move between minor versions is called from here: construction on
the meta device, the loader's inner functions, the experts interface, and there the weight conversion mapping.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.core_model_loading import (
    build_glob_alternation,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate, use_experts_implementation
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import logging as transformers_logging
from transformers.utils.generic import ContextManagers

from offload.errors import ModelError
from offload.model.transformers_weights import conversion_mapping

__all__ = ["use_experts_implementation"]  # for families with classes of their own; the rest is defined here
EXPERTS_IMPLEMENTATION = "run_local"
_ALIGNMENT = 64
_CORRECTIONS = ("e_score_correction_bias", "expert_bias")  # of the router, or of the block that it stands in
ExpertsFunction = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
default_apply_gate = _default_apply_gate
"""The inner step of most gated experts: ``act_fn(gate) * up``."""


@dataclass(frozen=True)
class ExpertsModule:
    """One experts module of the skeleton, after its weights were taken away.

    ``tensors`` gives the shape of one expert's part of each parameter, and its dtype.
    """

    path: str
    layer: int
    num_experts: int
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    module: torch.nn.Module

    @property
    def transposed(self) -> frozenset[str]:
        """The parameters that the module holds as [inputs, outputs]: all or none but in a few families."""
        own = getattr(self.module, "transposed", None)
        names = own if own is not None else self.tensors if getattr(self.module, "is_transposed", False) else ()
        return frozenset(names)

    @property
    def routed_to(self) -> int:
        """What the router chooses from: more than the experts where some choices have no weights."""
        return int(getattr(self.module, "routed_to", self.num_experts))

    @property
    def rows_of_one_matrix(self) -> bool:
        """Whether the checkpoint has the experts one below the other in one matrix, and not as a stack of matrices."""
        return bool(getattr(self.module, "rows_of_one_matrix", False))


def quiet() -> None:
    """Keep the library's progress bars and reports off the user's screen; errors still raise."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def register_experts_function(function: ExpertsFunction) -> None:
    """Offer ``function`` to every skeleton built here. Registering again replaces it (it holds no state)."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, function)


def use_own_names(model: PreTrainedModel) -> None:
    """Tensors of ``model`` go by its own names from now on: nothing is renamed or converted when it is loaded."""
    model.__dict__["run_local_names"] = True


def run_experts(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers does in the forward of an experts module that is behind its experts interface."""
    function: ExpertsFunction = ALL_EXPERTS_FUNCTIONS[EXPERTS_IMPLEMENTATION]
    return function(module, hidden, top_k_index, top_k_weights)


def forget_part(model: PreTrainedModel, path: str) -> None:
    """The module at ``path`` is to be taken out of a meta model: checkpoint tensors of it belong to nothing."""
    model.__dict__.setdefault("run_local_forgotten", []).append(f"{path}.")


def text_class(config: PretrainedConfig) -> tuple[Any, PretrainedConfig] | None:
    """The class that generates text for a config, and the config it takes; None if there is none.

    For a checkpoint of several modalities that is the class of its text part, if the library has one.
    """
    cls: Any = None
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        cls = cls or mapping.get(type(config), None)
    if cls is None:
        return None
    # a text model of a multimodal checkpoint takes the text part of its config, as in AutoModel.from_pretrained
    if config.sub_configs.get("text_config") is not None and cls.config_class is config.sub_configs["text_config"]:
        config = config.get_text_config()
    return cls, config


def construct(cls: Any, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """``cls`` on the meta device, with the experts function that is registered here. Raises what the class raises."""
    with ContextManagers(cls.get_init_context(dtype, False, False, None)):
        model: PreTrainedModel = cls(config)
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    return model


@dataclass(frozen=True)
class Router:
    """What chooses experts: ``weight`` [choices, hidden], and the correction [choices] that some families add.

    The first ``experts`` choices are experts; those beyond, in a few families, are none.
    """

    weight: torch.Tensor
    correction: torch.Tensor | None
    experts: int


def find_router(model: torch.nn.Module, experts: ExpertsModule) -> Router | None:
    """The router beside an experts module, or None if there is none of the usual form, or a table decides."""
    block = model.get_submodule(experts.path.rpartition(".")[0])
    for module in block.modules():
        weight = module._parameters.get("weight")
        if "tid2eid" in module._buffers:
            return None
        if module is experts.module or weight is None or weight.dim() != 2:
            continue
        if weight.shape[0] == experts.routed_to:
            holders = ((holder, name) for holder in (module, block) for name in _CORRECTIONS)
            correction = next((found for item in holders if (found := getattr(*item, None)) is not None), None)
            return Router(weight, None if correction is None else correction.float(), experts.num_experts)
    return None


def gates_with_silu(module: Any) -> bool:
    """Whether a gated experts module computes ``silu(gate) * up`` from its concatenated first product."""
    default = getattr(type(module)._apply_gate, "__name__", "") == "_default_apply_gate"
    return default and isinstance(module.act_fn, torch.nn.SiLU | SiLUActivation)


def attends_eagerly(model: PreTrainedModel) -> bool:
    """Whether attention scores are held in memory as a whole (``eager``) instead of block by block."""
    return bool(model.config.get_text_config()._attn_implementation == "eager")


def find_experts(model: PreTrainedModel) -> list[ExpertsModule]:
    """The experts modules of a meta model that still owns its expert parameters; changes nothing.

    An expert parameter is one that the experts module owns itself and whose first dimension counts the experts.
    Raises ModelError if two of them share a layer number.
    """
    found = []
    for path, module in model.named_modules():
        if not (hasattr(module, "is_concatenated") and hasattr(module, "has_post_expert_norm")):
            continue
        count = int(module.num_experts)  # type: ignore[arg-type]
        tensors = {
            name: (tuple(parameter.shape[1:]), parameter.dtype)
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.shape[:1] == (count,)
        }
        found.append(ExpertsModule(path, _layer_number(path), count, tensors, module))
    if len({module.layer for module in found}) < len(found):
        raise ModelError("this model has several experts modules in one layer, which is not supported")
    return found


def take_experts(model: PreTrainedModel, experts: Iterable[ExpertsModule]) -> None:
    """Remove the parameters of ``experts`` from a meta model, so that they are never read. Changes ``model``.

    Afterwards the model refuses ``save_pretrained``: it would write a checkpoint without experts.
    """
    for found in experts:
        for name in found.tensors:
            del found.module._parameters[name]
        block = model.get_submodule(found.path.rpartition(".")[0])
        for module in (found.module, block):  # else the loader initialises what is gone; some blocks do it for them
            if not module._non_persistent_buffers_set:
                module._is_hf_initialized = True  # type: ignore[assignment]
    model.save_pretrained = _refuse_save  # type: ignore[method-assign]


def load_weights(
    model: PreTrainedModel,
    folder: Path,
    tensors: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    on_tensor: Callable[[int], None],
) -> None:
    """Load checkpoint tensors into a meta model, through transformers' own conversion.

    ``tensors`` gives for each name what is read with ``[...]``. Changes ``model`` in place: weights on ``device`` in
    the checkpoint's dtype, tied weights tied, buffers built.
    ``on_tensor`` is called with the bytes of each tensor as it is read. Raises ModelError if a weight is missing
    or has another shape than the config says.
    """
    state = {key: _CountedSlice(tensor, on_tensor) for key, tensor in tensors.items()}
    config = LoadStateDictConfig(
        pretrained_model_name_or_path=str(folder),
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=conversion_mapping(model),
    )
    try:
        info, _ = type(model)._load_pretrained_model(model, state, None, config)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder}: a weight cannot be read ({error})") from error
    with contextlib.suppress(RuntimeError):  # raised with a table of what is wrong; its first line is said below
        info = type(model)._finalize_model_loading(model, config, info)
    for problem, names in (
        ("has another shape than config.json says", [item[0] for item in info.mismatched_keys]),
        ("could not be converted", list(info.conversion_errors or {})),
        ("is missing", list(info.missing_keys)),
    ):
        if names:
            first, *rest = sorted(names)
            more = f" (and {len(rest)} more)" if rest else ""
            raise ModelError(f"{folder}: weight {first}{more} {problem}; the checkpoint does not fit its config.json")


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Which parameters have no weights of their own but those of another one: {its name: the other's}."""
    return dict(model.all_tied_weights_keys)


def replace_module(model: PreTrainedModel, path: str, module: torch.nn.Module) -> None:
    """Put ``module``, which has no parameter ``weight``, at ``path``: the loader leaves its weights alone."""
    module._is_hf_initialized = True  # type: ignore[assignment]
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    tied = model.all_tied_weights_keys
    for pair in [pair for pair in tied.items() if f"{path}.weight" in pair]:
        del tied[pair[0]]


def apply_dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give weights the dtype in which the loader will keep them: some families hold a few in float32."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, name_of, _ = build_glob_alternation(list(plan))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if found := pattern.search(name):
            tensor.data = tensor.data.to(plan[name_of[str(found.lastgroup)]])


class _CountedSlice:
    """A safetensors slice that reports its bytes when it is read; the loader asks for ``[...]`` once."""

    def __init__(self, inner: Any, on_tensor: Callable[[int], None]) -> None:
        self._inner = inner
        self._on_tensor = on_tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._inner[index]
        self._on_tensor(tensor.numel() * tensor.element_size())
        # kernels may round differently by address: weights always stand where torch's own allocator puts them
        return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _layer_number(path: str) -> int:
    match = re.search(r"(?:^|\.)(\d+)\.", path)
    if match is None:
        raise ModelError(f"the experts module {path} names no layer")
    return int(match.group(1))


def _refuse_save(*args: Any, **kwargs: Any) -> None:
    raise ModelError("a skeleton has no routed experts and cannot be saved; copy the original checkpoint instead")
