"""The only file that touches transformers' private API. Written for transformers 5.23; see docs/dependencies.md.

Everything that is not documented upstream and may move between minor versions is called from here: construction on
the meta device, the weight conversion mapping, the loader's inner functions, and the experts interface.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.conversion_mapping import get_model_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import logging as transformers_logging
from transformers.utils.generic import ContextManagers

from offload.errors import ModelError

__all__ = ["use_experts_implementation"]  # for families with classes of their own; the rest is defined here
EXPERTS_IMPLEMENTATION = "run_local"
_ALIGNMENT = 64
_CORRECTIONS = ("e_score_correction_bias", "expert_bias")  # of the router, or of the block that it stands in
ExpertsFunction = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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
    def transposed(self) -> bool:
        """Whether the module holds its matrices as [inputs, outputs]."""
        return bool(getattr(self.module, "is_transposed", False))


@dataclass(frozen=True)
class TensorSource:
    """The checkpoint tensors that make up one parameter of one experts module.

    ``keys`` maps each source pattern of ``converter`` to checkpoint tensor names in order: one for each expert, or
    a single fused one whose first dimension is the expert. Without a converter there is one pattern and one key.
    """

    converter: WeightConverter | None
    keys: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class ParameterSource:
    """The checkpoint tensors that one conversion makes ``parameters`` of: mostly one of one, under another name.

    The first of them is the one that transformers files the conversion under.
    """

    parameters: tuple[str, ...]
    source: TensorSource


def quiet() -> None:
    """Keep the library's progress bars and reports off the user's screen; errors still raise."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def register_experts_function(function: ExpertsFunction) -> None:
    """Offer ``function`` to every skeleton built here. Registering again replaces it (it holds no state)."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, function)


def register_layout(model_type: str, experts: str, matrices: tuple[str, str, str], renamed: Mapping[str, str]) -> None:
    """Say how checkpoints of a family of our own name their tensors: ``experts`` are separate linear layers under that
    path, whose ``matrices`` are called so (gate, up, down); of all tensors, parts of their names are ``renamed``.
    """
    gate, up, down = (f"{experts}.*.{name}.weight" for name in matrices)
    mapping = [
        *(WeightRenaming(ours, theirs) for ours, theirs in renamed.items()),
        WeightConverter([gate, up], [f"{experts}.gate_up_proj"], [MergeModulelist(dim=0), Concatenate(dim=1)]),
        WeightConverter([down], [f"{experts}.down_proj"], [MergeModulelist(dim=0)]),
    ]
    register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)


def use_own_names(model: PreTrainedModel) -> None:
    """Tensors of ``model`` go by its own names from now on: nothing is renamed or converted when it is loaded."""
    model.__dict__["run_local_names"] = True


def row_joiner(patterns: list[str], name: str) -> WeightConverter:
    """Makes ``name`` of stacked experts' weights, one below the other."""
    return WeightConverter(patterns, [name], [Concatenate(dim=1)])


def _conversion_mapping(model: PreTrainedModel) -> list[Any]:
    return [] if "run_local_names" in model.__dict__ else list(get_model_conversion_mapping(model))


def build_meta_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model on the meta device: shapes and dtypes, no memory.

    Raises ModelError if transformers has no text generation class for the config, or its experts are not behind the
    experts interface.
    """
    cls: Any = None
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        cls = cls or mapping.get(type(config), None)
    if cls is None:
        raise ModelError(f"transformers has no text generation model for model_type '{config.model_type}'")
    # a text model of a multimodal checkpoint takes the text part of its config, as in AutoModel.from_pretrained
    if config.sub_configs.get("text_config") is not None and cls.config_class is config.sub_configs["text_config"]:
        config = config.get_text_config()
    try:
        with ContextManagers(cls.get_init_context(dtype, False, False, None)):
            model = cls(config)
    except Exception as error:
        raise ModelError(f"config.json describes no {config.model_type} model: {error}") from error
    if not find_experts(model):
        raise ModelError(
            f"model_type '{config.model_type}' has no routed experts behind transformers' experts interface; "
            "only Mixture-of-Experts models of supported families can be run"
        )
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    _apply_dtype_plan(model, dtype)
    return model


@dataclass(frozen=True)
class Router:
    """What chooses experts: ``weight`` [experts, hidden], and the correction [experts] that some families add."""

    weight: torch.Tensor
    correction: torch.Tensor | None


def find_router(model: torch.nn.Module, experts: ExpertsModule) -> Router | None:
    """The router beside an experts module, or None if there is none of the usual form."""
    block = model.get_submodule(experts.path.rpartition(".")[0])
    for module in block.modules():
        weight = module._parameters.get("weight")
        if module is experts.module or weight is None or weight.dim() != 2:
            continue
        if weight.shape[0] == experts.num_experts:
            holders = (
                (holder, name) for holder in (module, block) for name in ("e_score_correction_bias", "expert_bias")
            )
            correction = next((found for item in holders if (found := getattr(*item, None)) is not None), None)
            return Router(weight, None if correction is None else correction.float())
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
        found.module._is_hf_initialized = True  # type: ignore[assignment]  # else the loader initialises what is gone
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
        weight_mapping=_conversion_mapping(model),
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


def sort_checkpoint(
    model: PreTrainedModel, experts: Iterable[ExpertsModule], keys: Iterable[str]
) -> tuple[dict[tuple[str, str], TensorSource], list[str]]:
    """Sort checkpoint tensor names into expert tensors and the rest, by transformers' own conversion mapping.

    ``model`` must still own its expert parameters (call before :func:`take_experts`). Returns
    ``{(experts module path, parameter): source}`` and the names of all other tensors.
    """
    meta = model.state_dict()
    wanted = {(module.path, name) for module in experts for name in module.tensors}
    converter_of: dict[tuple[str, str], WeightConverter | None] = {}
    sources: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    rest = []
    for key, renamed, pattern, converter in _renamed(model, keys):
        path, _, name = renamed.rpartition(".")
        if renamed in meta and (path, name) in wanted:
            sources[path, name][pattern or key].append(key)
            converter_of[path, name] = converter
        elif renamed in meta or pattern is not None:
            rest.append(key)
    lost = wanted - sources.keys()
    if lost:
        path, name = min(lost)
        raise ModelError(f"the checkpoint has no weights for {path}.{name}; its files do not fit its config.json")
    return {
        target: TensorSource(converter_of[target], {pattern: tuple(names) for pattern, names in found.items()})
        for target, found in sources.items()
    }, rest


def find_sources(model: PreTrainedModel, names: Collection[str], keys: Iterable[str]) -> list[ParameterSource]:
    """What makes up the parameters ``names`` in a checkpoint that has the tensors ``keys``; some may have nothing.

    Raises ModelError if a checkpoint tensor makes up one of them and another parameter too.
    """
    meta = model.state_dict()
    found: dict[str, tuple[WeightConverter | None, dict[str, list[str]]]] = {}
    for key, renamed, pattern, converter in _renamed(model, keys):
        found.setdefault(renamed, (converter, defaultdict(list)))[1][pattern or key].append(key)
    sources = []
    for first, (converter, parts) in found.items():
        patterns = converter.target_patterns if converter is not None else []
        parameters = (first, *(first.replace(patterns[0], pattern) for pattern in patterns[1:]))
        others = [name for name in parameters if name in meta and name not in names]
        if len(others) < sum(name in meta for name in parameters):
            if others:
                raise ModelError(
                    f"the checkpoint holds {others[0]} and weights that are quantised in one tensor, which is not "
                    "supported; use --dense-format native"
                )
            source = TensorSource(converter, {pattern: tuple(keys) for pattern, keys in parts.items()})
            sources.append(ParameterSource(parameters, source))
    return sources


def convert_parameters(
    model: PreTrainedModel, found: ParameterSource, read: Callable[[str, slice], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The parameters of ``found`` by name, as its converter makes them; ``read`` as in :func:`convert_expert`."""
    assert found.source.converter is not None
    converter = deepcopy(found.source.converter)
    converter.collected_tensors.clear()
    for pattern, keys in found.source.keys.items():
        converter.collected_tensors[pattern] += [cast(Any, partial(read, key, slice(None))) for key in keys]
    result = converter.convert(found.parameters[0], model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in result.items()}


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


def _renamed(model: PreTrainedModel, keys: Iterable[str]) -> Iterator[tuple[str, str, str | None, Any]]:
    """Of each checkpoint tensor, in the loader's order: its name, the parameter's, and the pattern and converter that
    make the one into the other, if any. ``model`` must still own all its parameters.
    """
    mapping = _conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    meta = model.state_dict()
    for key in sorted(keys, key=dot_natural_key):
        renamed, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, meta)
        if renamed not in meta and key in meta:
            renamed, pattern = rename_source_key(key, [], [], model.base_model_prefix, meta)
        yield key, renamed, pattern, by_pattern[pattern] if pattern else None


def convert_expert(
    model: PreTrainedModel, target: str, source: TensorSource, expert: int, read: Callable[[str, slice], torch.Tensor]
) -> torch.Tensor:
    """One expert's part of the parameter ``target``, as stock loading would place it there.

    ``read(key, rows)`` returns those rows (along dimension 0) of a checkpoint tensor. The converter runs on a stack
    of one expert, so never more than that expert is in memory.
    """
    parts: dict[str, torch.Tensor] = {}
    for pattern, keys in source.keys.items():
        if "*" in pattern and source.converter is not None:
            parts[pattern] = read(keys[expert], slice(None))
        else:
            parts[pattern] = read(keys[0], slice(expert, expert + 1))
    if source.converter is None:
        (tensor,) = parts.values()
        return tensor[0]
    converter = deepcopy(source.converter)
    converter.collected_tensors.clear()
    for pattern, tensor in parts.items():
        converter.collected_tensors[pattern].append(cast(Any, partial(_identity, tensor)))
    result = converter.convert(target, model=model, config=model.config)[target]
    tensor = result[0] if isinstance(result, list) else result
    return tensor[0]


def _apply_dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give weights the dtype in which the loader will keep them: some families hold a few in float32."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, name_of, _ = build_glob_alternation(list(plan))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if found := pattern.search(name):
            tensor.data = tensor.data.to(plan[name_of[str(found.lastgroup)]])


def joined_patterns(converter: WeightConverter | None) -> list[str] | None:
    """The source patterns of a converter whose tensors stand one below the other in what it makes of one expert.

    Empty without a converter; None for one that does more than stacking experts and joining rows.
    """
    if converter is None:
        return []
    for operation in converter.operations:
        stacks = type(operation) is MergeModulelist and operation.dim == 0
        if not stacks and not (isinstance(operation, Concatenate) and operation.dim == 1):
            return None
    return list(converter.source_patterns)


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


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
