"""An expert of a quantised checkpoint as it is published: which packed matrices make up its parameters.

A parameter of several matrices, one below the other (``gate_up_proj`` of ``gate_proj`` and ``up_proj``), stands in the
record as pieces, ``gate_up_proj.0`` and ``gate_up_proj.1``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from offload.checkpoint.formats.base import TensorSpecs
from offload.checkpoint.formats.method import Method
from offload.checkpoint.formats.packed import PackedLayout, PackedMatrix
from offload.errors import ModelError
from offload.model import transformers_api as api
from offload.model import transformers_weights as tw

if TYPE_CHECKING:
    from offload.checkpoint.source import CheckpointSource


class _Piece(NamedTuple):
    """``keys`` has the tensor of each expert, or one that holds the matrices of all (``fused``)."""

    name: str
    keys: tuple[str, ...]
    fused: bool

    def of(self, expert: int) -> str:
        return self.keys[0] if self.fused else self.keys[expert]


def predicted_specs(module: api.ExpertsModule, method: Method) -> TensorSpecs:
    """The record of an expert as ``config.json`` alone lets expect it."""
    specs: dict[str, tuple[tuple[int, ...], torch.dtype | PackedLayout]] = {}
    for name, (shape, dtype) in module.tensors.items():
        layout = method.predict((shape[0], shape[1]), dtype, name in module.transposed) if len(shape) == 2 else None
        specs[name] = (shape, dtype if layout is None else layout)
    return specs


def record_specs(source: CheckpointSource, module: api.ExpertsModule) -> TensorSpecs:
    """Raises ModelError if the experts of a layer differ in how they are held, or no record can keep them so."""
    specs: dict[str, tuple[tuple[int, ...], torch.dtype | PackedLayout]] = {}
    for name, (shape, dtype) in module.tensors.items():
        source.check_experts(module, name)
        pieces = _pieces(source, module, name)
        if pieces is None:
            specs[name] = (shape, dtype)
            continue
        rows = columns = 0
        for piece in pieces:
            layouts = {_layout(source, piece.of(expert)) for expert in range(module.num_experts)}
            if len(layouts) > 1 or None in layouts:
                raise ModelError(
                    f"{source.folder}: the experts of {module.path} are not all quantised in one way, which cannot be "
                    "kept as it is; use --format int8 or int4"
                )
            (layout,) = layouts
            assert layout is not None
            rows, columns = rows + layout.shape[0], layout.shape[1]
            specs[piece.name] = (layout.shape, layout)
        if (rows, columns) != shape:
            raise ModelError(
                f"{source.folder}: the weights of {module.path}.{name} have shape {(rows, columns)} for an "
                f"expert, config.json says {shape}"
            )
    return specs


def read_expert(
    source: CheckpointSource, module: api.ExpertsModule, expert: int, read: Callable[[str, slice], torch.Tensor]
) -> dict[str, torch.Tensor | PackedMatrix]:
    """The bytes of one expert by the names of :func:`record_specs`; ``read`` gives rows of a checkpoint tensor."""
    found: dict[str, torch.Tensor | PackedMatrix] = {}
    experts = source.expert_reader(module, read)
    for name, (_, dtype) in module.tensors.items():
        pieces = _pieces(source, module, name)
        if pieces is None:
            target = f"{module.path}.{name}"
            tensor = tw.convert_expert(source.model, target, source.expert_sources[module.path, name], expert, experts)
            found[name] = tensor.to(dtype)
            continue
        for piece in pieces:
            found[piece.name] = source.packed.matrix(piece.of(expert), expert if piece.fused else None, read)
    return found


def _pieces(source: CheckpointSource, module: api.ExpertsModule, name: str) -> list[_Piece] | None:
    """The packed matrices of a parameter in the order of their rows; None if nothing of it is packed."""
    found = source.expert_sources[module.path, name]
    keys = [key for some in found.keys.values() for key in some]
    if not any(key in source.packed.tensors for key in keys):
        return None
    patterns = tw.joined_patterns(found.converter)
    if patterns is None:
        raise ModelError(
            f"{source.folder}: the weights {keys[0]} must be rearranged, which packed ones cannot be; use "
            "--format int8 or int4"
        )
    return list(_sorted(name, found, patterns))


def _sorted(name: str, found: tw.TensorSource, patterns: list[str]) -> Iterator[_Piece]:
    parts = [(pattern, found.keys[pattern]) for pattern in patterns if pattern in found.keys]
    parts = parts or list(found.keys.items())
    for number, (pattern, keys) in enumerate(parts):
        fused = found.converter is None or "*" not in pattern
        yield _Piece(name if len(parts) == 1 else f"{name}.{number}", keys, fused)


def _layout(source: CheckpointSource, key: str) -> PackedLayout | None:
    packed = source.packed.tensors.get(key)
    return None if packed is None else packed.layout
