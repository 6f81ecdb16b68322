"""Which checkpoint tensors make up which parameters of a model, by transformers' own conversion mapping.

The second of the two files that touch transformers' private API; :mod:`offload.model.transformers_api` is the first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from offload.errors import ModelError

if TYPE_CHECKING:
    from offload.model.transformers_api import ExpertsModule


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


def row_joiner(patterns: list[str], name: str) -> WeightConverter:
    """Makes ``name`` of stacked experts' weights, one below the other."""
    return WeightConverter(patterns, [name], [Concatenate(dim=1)])


def register_layout(model_type: str, experts: str, matrices: tuple[str, str, str], renamed: Mapping[str, str]) -> None:
    """Say how checkpoints of a family of our own name their tensors: ``experts`` are separate linear layers under that
    path, whose ``matrices`` are called so (gate, up, down); of all tensors, parts of their names are ``renamed``.
    """
    register_checkpoint_conversion_mapping(model_type, _layout(experts, matrices, renamed), overwrite=True)


def use_layout(
    model: PreTrainedModel, experts: str, matrices: tuple[str, str, str], renamed: Mapping[str, str]
) -> None:
    """As :func:`register_layout`, for the checkpoint of this model alone."""
    model.__dict__.setdefault("run_local_conversions", []).extend(_layout(experts, matrices, renamed))


def _layout(experts: str, matrices: tuple[str, str, str], renamed: Mapping[str, str]) -> list[Any]:
    gate, up, down = (f"{experts}.*.{name}.weight" for name in matrices)
    return [
        *(WeightRenaming(ours, theirs) for ours, theirs in renamed.items()),
        WeightConverter([gate, up], [f"{experts}.gate_up_proj"], [MergeModulelist(dim=0), Concatenate(dim=1)]),
        WeightConverter([down], [f"{experts}.down_proj"], [MergeModulelist(dim=0)]),
    ]


def conversion_mapping(model: PreTrainedModel) -> list[Any]:
    if "run_local_names" in model.__dict__:
        return []
    return [*get_model_conversion_mapping(model), *deepcopy(model.__dict__.get("run_local_conversions", []))]


def add_conversions(model: PreTrainedModel, conversions: Mapping[str, Sequence[str]]) -> None:
    """Say which checkpoint tensors make up parameters that transformers does not know: {parameter: tensors}, as
    patterns; several stand one below the other in each expert."""
    for name, patterns in conversions.items():
        joins = len(patterns) > 1
        found = row_joiner([*patterns], name) if joins else WeightRenaming(*patterns, name)
        model.__dict__.setdefault("run_local_conversions", []).append(found)


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
    forgotten = tuple(model.__dict__.get("run_local_forgotten", ()))
    for key, renamed, pattern, converter in _renamed(model, keys):
        path, _, name = renamed.rpartition(".")
        if renamed in meta and (path, name) in wanted:
            sources[path, name][pattern or key].append(key)
            converter_of[path, name] = converter
        elif renamed in meta or (pattern is not None and not renamed.startswith(forgotten)):
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


def _renamed(model: PreTrainedModel, keys: Iterable[str]) -> Iterator[tuple[str, str, str | None, Any]]:
    """Of each checkpoint tensor, in the loader's order: its name, the parameter's, and the pattern and converter that
    make the one into the other, if any. ``model`` must still own all its parameters.
    """
    mapping = conversion_mapping(model)
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
    for operation in converter.operations:
        if isinstance(operation, Transpose) and operation.check_dims:  # it would look at the shape of all experts
            whole = (model.get_parameter(target).shape[0], *next(iter(parts.values())).shape[1:])
            if whole == model.get_parameter(target).shape:
                operation.dim1 = operation.dim0
            operation.check_dims = False
    for pattern, tensor in parts.items():
        converter.collected_tensors[pattern].append(cast(Any, partial(_identity, tensor)))
    result = converter.convert(target, model=model, config=model.config)[target]
    tensor = result[0] if isinstance(result, list) else result
    return tensor[0]


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
