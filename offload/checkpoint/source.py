"""A checkpoint folder, sorted into experts and skeleton."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

import offload.model.experts  # noqa: F401 - offers the experts function that the model below selects by name
from offload.checkpoint import published
from offload.checkpoint.config_file import default_dtype, open_safetensors, read_config
from offload.checkpoint.formats.base import TensorSpecs
from offload.checkpoint.formats.method import Method
from offload.checkpoint.formats.methods import get_method
from offload.checkpoint.formats.packed import PackedMatrix, PackedTensor
from offload.checkpoint.gguf_source import GgufCheckpoint, GgufMethod, open_gguf
from offload.checkpoint.mistral_layout import modalities_of_params, read_params, use_mistral_names
from offload.checkpoint.model_folder import (
    MODELOPT_FILE,
    choose_weights,
    has_mistral_layout,
    index_path,
    read_json_object,
)
from offload.checkpoint.packed_tensors import PackedSlice, PackedTensors
from offload.checkpoint.reading import KeepInPlace, Staging, TensorFiles
from offload.errors import ModelError
from offload.model import transformers_api as api
from offload.model import transformers_weights as tw
from offload.model.meta import build_meta_model
from offload.model.modalities import other_modalities

ReadRows = Callable[[str, slice], torch.Tensor]
"""(checkpoint tensor, rows along its first dimension) -> these rows."""


@dataclass
class CheckpointSource:
    """``model`` is on the meta device and still owns its expert parameters until the skeleton is loaded from it.

    ``files`` names the file of every tensor; ``skeleton_keys`` are the tensors that are not experts. In a quantised
    checkpoint (``method``) the tensors in ``packed`` go by the names that they would have if they were not.
    ``left_out`` is what the checkpoint has beside its text model: ``vision``, ``audio``.
    """

    folder: Path
    config: PretrainedConfig
    dtype: torch.dtype
    model: PreTrainedModel
    experts: list[api.ExpertsModule]
    files: dict[str, Path]
    expert_sources: dict[tuple[str, str], tw.TensorSource]
    skeleton_keys: list[str]
    packed: PackedTensors = field(default_factory=lambda: PackedTensors({}))
    method: Method | None = None
    gguf: GgufCheckpoint | None = None
    left_out: tuple[str, ...] = ()
    _handles: dict[Path, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tensors = TensorFiles(self.files, None if self.gguf is None else self.gguf.places)

    def read_expert(
        self, module: api.ExpertsModule, expert: int, staging: Staging | None = None
    ) -> dict[str, torch.Tensor]:
        """The tensors of one expert as stock transformers would load them, in the model's dtype, on the CPU.

        With ``staging`` they stand there, as far as they need no conversion, and are good until it is reset. Raises
        ModelError if the checkpoint's tensors are damaged or have other shapes than the config says.
        """
        if staging is not None:
            with KeepInPlace():
                return self._read_expert(module, expert, partial(self._stage, staging))
        return self._read_expert(module, expert, self._read)

    def announce_expert(self, module: api.ExpertsModule, expert: int) -> None:
        """Let the system start reading what :meth:`read_expert` will ask for soon."""
        for name in module.tensors:
            source = self.expert_sources[module.path, name]
            for pattern, keys in source.keys.items():
                fused = source.converter is None or "*" not in pattern
                if fused or expert < len(keys):
                    key, rows = (
                        (keys[0], self._rows_of(module, keys[0], expert)) if fused else (keys[expert], slice(None))
                    )
                    packed = self.packed.tensors.get(key)
                    for part in (key,) if packed is None else packed.keys:
                        self._tensors.announce(part, rows)

    def record_specs(self, module: api.ExpertsModule) -> TensorSpecs:
        """What the record of an expert of ``module`` holds in the format ``native``: :meth:`read_published`.

        Without weights it is what the config lets expect. Raises ModelError if the experts are held in ways that no
        record can keep as they are.
        """
        if self.method is None:
            return module.tensors
        if not self.files:
            return published.predicted_specs(module, self.method)
        return published.record_specs(self, module)

    def read_published(
        self, module: api.ExpertsModule, expert: int, staging: Staging | None = None
    ) -> dict[str, torch.Tensor | PackedMatrix]:
        """One expert as :meth:`record_specs` says: packed matrices with the bytes that the checkpoint has.

        All else is as in :meth:`read_expert`.
        """
        if self.method is None:
            return dict(self.read_expert(module, expert, staging))
        part = self._read_part if staging is None else partial(self._stage_part, staging)
        return published.read_expert(self, module, expert, part)

    def tensor_slices(self, keys: Iterable[str]) -> dict[str, Any]:
        """Of each tensor what transformers' loader takes for it: read, and decoded, when it asks for ``[...]``."""
        slices = {}
        for key in keys:
            if key in self.packed.tensors or self.gguf is not None:
                slices[key] = PackedSlice(partial(self._read, key, slice(None)))
            else:
                slices[key] = self._handle(self.files[key]).get_slice(key)
        return slices

    def check_experts(self, module: api.ExpertsModule, name: str) -> None:
        """Raises ModelError if the checkpoint has weights of another number of experts for a parameter."""
        for pattern, keys in self.expert_sources[module.path, name].keys.items():
            fused = self.expert_sources[module.path, name].converter is None or "*" not in pattern
            count = self._rows(keys[0]) if fused else len(keys)
            if fused and module.rows_of_one_matrix and count % module.num_experts == 0:
                continue
            if count not in (module.num_experts, module.routed_to):
                raise ModelError(
                    f"{self.folder}: there are weights of {count} experts ({keys[0]}), but config.json says "
                    f"{module.num_experts}"
                )

    def expert_reader(self, module: api.ExpertsModule, read: ReadRows) -> ReadRows:
        """``read`` as :func:`offload.model.transformers_weights.convert_expert` wants it: rows count experts."""
        if not module.rows_of_one_matrix:
            return read

        def read_experts(key: str, experts: slice) -> torch.Tensor:
            rows = self._rows_of(module, key, experts.start)
            return read(key, rows)[None]

        return read_experts

    def _rows_of(self, module: api.ExpertsModule, key: str, expert: int) -> slice:
        """Where an expert stands in a tensor that holds those of all experts."""
        rows = self._rows(key) // module.num_experts if module.rows_of_one_matrix else 1
        return slice(expert * rows, (expert + 1) * rows)

    def _read_expert(self, module: api.ExpertsModule, expert: int, read: ReadRows) -> dict[str, torch.Tensor]:
        tensors = {}
        read = self.expert_reader(module, read)
        for name, (shape, dtype) in module.tensors.items():
            target = f"{module.path}.{name}"
            source = self.expert_sources[module.path, name]
            self.check_experts(module, name)
            tensor = tw.convert_expert(self.model, target, source, expert, read)
            if tuple(tensor.shape) != shape:
                raise ModelError(
                    f"{self.folder}: expert {expert} of {target} has shape {tuple(tensor.shape)}, "
                    f"config.json says {shape}"
                )
            tensors[name] = tensor.to(dtype)
        return tensors

    def find_parameters(self, names: Collection[str]) -> list[tw.ParameterSource]:
        """What makes up the parameters ``names`` of the skeleton; some may have nothing in the checkpoint.

        Raises ModelError if a checkpoint tensor makes up one of them and another parameter too.
        """
        return tw.find_sources(self.model, names, self.skeleton_keys)

    def read_parameters(self, found: tw.ParameterSource, block: int) -> Iterator[tuple[str, int, torch.Tensor]]:
        """(parameter, first row, rows) until all rows were given, in order, on the CPU, in the checkpoint's dtype.

        Matrices that stand in the checkpoint as they are come in parts of about ``block`` weights, each good until the
        next; those that must be converted are converted as a whole. Raises ModelError if a tensor is damaged.
        """
        if found.source.converter is not None:
            for name, tensor in tw.convert_parameters(self.model, found, self._read).items():
                yield name, 0, tensor
            return
        key = next(iter(found.source.keys.values()))[0]
        if self.gguf is not None and (key in self.gguf.changes or key in self.gguf.composed):
            yield found.parameters[0], 0, self._read(key, slice(None))
            return
        shape = self._shape(key)
        step = max(1, block // max(1, math.prod(shape[1:])))
        staging = Staging()
        for first in range(0, shape[0] if shape else 0, step):
            staging.reset()
            yield found.parameters[0], first, self._stage(staging, key, slice(first, min(first + step, shape[0])))

    def close(self) -> None:
        """Close the checkpoint's files; they open again when needed."""
        self._handles.clear()
        self._tensors.close()

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            self._handles[file] = open_safetensors(file)
        return self._handles[file]

    def _rows(self, key: str) -> int:
        """Length of a checkpoint tensor along its first dimension."""
        shape = self._shape(key)
        return shape[0] if shape else 0

    def _shape(self, key: str) -> list[int]:
        if key in self.packed.tensors:
            return list(self.packed.tensors[key].shape)
        if self.gguf is not None:
            return list(self.gguf.places[key].shape)
        shape: list[int] = self._handle(self.files[key]).get_slice(key).get_shape()
        return shape

    def _stage(self, staging: Staging, key: str, rows: slice) -> torch.Tensor:
        if key in self.packed.tensors:
            return self._read(key, rows)
        return self._stage_part(staging, key, rows)

    def _stage_part(self, staging: Staging, key: str, rows: slice) -> torch.Tensor:
        staged = self._tensors.read(key, rows, staging)
        return self._read_part(key, rows) if staged is None else staged

    def _read(self, key: str, rows: slice) -> torch.Tensor:
        if self.gguf is not None and key in self.gguf.changes:
            return self.gguf.changes[key](self._decoded(key, slice(None)))[rows]
        if self.gguf is not None and key in self.gguf.composed:
            parts, compose = self.gguf.composed[key]
            return compose(*(self._decoded(part, slice(None)) for part in parts))[rows]
        return self._decoded(key, rows)

    def _decoded(self, key: str, rows: slice) -> torch.Tensor:
        if key in self.packed.tensors:
            return self.packed.decoded(key, rows, self.dtype, self._read_part)
        return self._read_part(key, rows)

    def _read_part(self, key: str, rows: slice) -> torch.Tensor:
        if self.gguf is not None:
            return self._tensors.read_rows(key, rows)
        file = self.files[key]
        handle = self._handle(file)
        try:
            found = handle.get_slice(key)
            tensor: torch.Tensor = found[rows] if found.get_shape() else handle.get_tensor(key)
        except Exception as error:  # the binding raises its own, OSError and IndexError
            raise ModelError(f"{file}: tensor {key} cannot be read ({error}); download the file again") from error
        return tensor


def open_source(folder: Path, *, weights: bool = True) -> CheckpointSource:
    """Read config and tensor names of a checkpoint; no weights yet. Raises ModelError naming what is wrong.

    Without ``weights`` only the config is read; the result serves for planning.
    """
    api.quiet()
    if (gguf := open_gguf(folder)) is not None:
        return _open_gguf(folder, gguf)
    own_layout = has_mistral_layout(folder)
    config = read_params(folder) if own_layout else read_config(folder)
    files = tensor_files(folder) if weights else {}
    dtype = default_dtype(config, folder)
    model = build_meta_model(config, dtype)
    if own_layout:
        use_mistral_names(model)
    experts = api.find_experts(model)
    method = _method(folder, config)
    packed = PackedTensors({})
    sources: dict[tuple[str, str], tw.TensorSource] = {}
    rest: list[str] = []
    if weights:
        if method is not None:
            packed = PackedTensors(_find_packed(folder, method, files))
        names = packed.names(files)
        files |= {name: files[found.keys[0]] for name, found in packed.tensors.items()}
        sources, rest = tw.sort_checkpoint(model, experts, names)
    left_out = modalities_of_params(folder) if own_layout else other_modalities(config)
    return CheckpointSource(
        folder, config, dtype, model, experts, files, sources, rest, packed, method, left_out=left_out
    )


def _open_gguf(path: Path, gguf: GgufCheckpoint) -> CheckpointSource:
    try:
        config = gguf.config()
        dtype = default_dtype(config, path.parent, gguf.dtype)
        model = build_meta_model(config, dtype)
        api.use_own_names(model)
        experts = api.find_experts(model)
        sources, skeleton, packed = gguf.sort(model, experts)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    files = dict(gguf.file_of) | {name: gguf.file_of[key] for name, key in skeleton.items()}
    method = GgufMethod({}) if gguf.is_quantised else None
    return CheckpointSource(
        path, config, dtype, model, experts, files, sources, list(skeleton), PackedTensors(packed), method, gguf
    )


def _method(folder: Path, config: PretrainedConfig) -> Method | None:
    """How the checkpoint is quantised. Raises ModelError if that is not supported."""
    for part in (config, config.get_text_config()):
        # MLX names it "quantization"; NVIDIA's tools have written it into a file of its own
        mlx = getattr(part, "quantization", None)
        said = getattr(part, "quantization_config", None) or (mlx if isinstance(mlx, dict) else _modelopt(folder))
        if said is not None:
            try:
                return get_method(said if isinstance(said, dict) else said.to_dict())
            except ModelError as error:
                raise ModelError(f"{folder}: {error}") from error
    return None


def _modelopt(folder: Path) -> dict[str, Any] | None:
    if not (folder / MODELOPT_FILE).exists():
        return None
    return {"quant_method": "modelopt", **(read_json_object(folder / MODELOPT_FILE).get("quantization") or {})}


def _find_packed(folder: Path, method: Method, files: dict[str, Path]) -> dict[str, PackedTensor]:
    tensors = TensorFiles(files)
    try:
        return method.find(tensors.entries(), tensors.read_whole)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    finally:
        tensors.close()


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor, by the index where there is one, else by the files' own headers.

    Raises ModelError for a damaged index, a missing shard, and files that the index does not match.
    """
    index = index_path(folder)
    listed: dict[str, str] | None = None
    if index.exists():
        try:
            listed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            if not all(isinstance(name, str) for name in listed.values()):
                raise TypeError("a file name is no text")
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{index}: the index is damaged ({error}); download it again") from error
    names = (
        sorted(set(listed.values())) if listed else choose_weights(file.name for file in folder.glob("*.safetensors"))
    )
    if not names:
        raise ModelError(f"{folder}: there are no .safetensors files; only safetensors checkpoints are loaded")
    found: dict[str, Path] = {}
    for name in names:
        if not (folder / name).exists():
            raise ModelError(f"{folder}: {name} is missing, though {index.name} lists it; download it again")
        handle = open_safetensors(folder / name)
        found |= dict.fromkeys(handle.keys(), folder / name)
    lost = sorted(set(listed or ()) - found.keys())
    if lost:
        raise ModelError(f"{folder}: tensor {lost[0]} is in {index.name} but in no file; download the files again")
    return {key: found[key] for key in listed} if listed else found
