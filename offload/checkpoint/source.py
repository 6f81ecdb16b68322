"""A checkpoint folder, sorted into experts and skeleton."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

import offload.model.experts  # noqa: F401 - offers the experts function that the model below selects by name
from offload.checkpoint.model_folder import INDEX_FILE
from offload.checkpoint.reading import KeepInPlace, Staging, TensorFiles
from offload.errors import ModelError
from offload.model import transformers_api as api


@dataclass
class CheckpointSource:
    """``model`` is on the meta device and still owns its expert parameters until the skeleton is loaded from it.

    ``files`` names the file of every tensor; ``skeleton_keys`` are the tensors that are not experts.
    """

    folder: Path
    config: PretrainedConfig
    dtype: torch.dtype
    model: PreTrainedModel
    experts: list[api.ExpertsModule]
    files: dict[str, Path]
    expert_sources: dict[tuple[str, str], api.TensorSource]
    skeleton_keys: list[str]
    _handles: dict[Path, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tensors = TensorFiles(self.files)

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
                if source.converter is None or "*" not in pattern:
                    self._tensors.announce(keys[0], slice(expert, expert + 1))
                elif expert < len(keys):
                    self._tensors.announce(keys[expert], slice(None))

    def _read_expert(
        self, module: api.ExpertsModule, expert: int, read: Callable[[str, slice], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, (shape, dtype) in module.tensors.items():
            target = f"{module.path}.{name}"
            source = self.expert_sources[module.path, name]
            for pattern, keys in source.keys.items():
                fused = source.converter is None or "*" not in pattern
                count = self._rows(keys[0]) if fused else len(keys)
                if count != module.num_experts:
                    raise ModelError(
                        f"{self.folder}: there are weights of {count} experts ({keys[0]}), but config.json says "
                        f"{module.num_experts}"
                    )
            tensor = api.convert_expert(self.model, target, source, expert, read)
            if tuple(tensor.shape) != shape:
                raise ModelError(
                    f"{self.folder}: expert {expert} of {target} has shape {tuple(tensor.shape)}, "
                    f"config.json says {shape}"
                )
            tensors[name] = tensor.to(dtype)
        return tensors

    def find_parameters(self, names: Collection[str]) -> list[api.ParameterSource]:
        """What makes up the parameters ``names`` of the skeleton; some may have nothing in the checkpoint.

        Raises ModelError if a checkpoint tensor makes up one of them and another parameter too.
        """
        return api.find_sources(self.model, names, self.skeleton_keys)

    def read_parameters(self, found: api.ParameterSource, block: int) -> Iterator[tuple[str, int, torch.Tensor]]:
        """(parameter, first row, rows) until all rows were given, in order, on the CPU, in the checkpoint's dtype.

        Matrices that stand in the checkpoint as they are come in parts of about ``block`` weights, each good until the
        next; those that must be converted are converted as a whole. Raises ModelError if a tensor is damaged.
        """
        if found.source.converter is not None:
            for name, tensor in api.convert_parameters(self.model, found, self._read).items():
                yield name, 0, tensor
            return
        key = next(iter(found.source.keys.values()))[0]
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
            self._handles[file] = api.open_safetensors(file)
        return self._handles[file]

    def _rows(self, key: str) -> int:
        """Length of a checkpoint tensor along its first dimension."""
        shape = self._shape(key)
        return shape[0] if shape else 0

    def _shape(self, key: str) -> list[int]:
        shape: list[int] = self._handle(self.files[key]).get_slice(key).get_shape()
        return shape

    def _stage(self, staging: Staging, key: str, rows: slice) -> torch.Tensor:
        staged = self._tensors.read(key, rows, staging)
        return self._read(key, rows) if staged is None else staged

    def _read(self, key: str, rows: slice) -> torch.Tensor:
        file = self.files[key]
        handle = self._handle(file)
        try:
            tensor: torch.Tensor = handle.get_slice(key)[rows]
        except Exception as error:  # the binding raises its own, OSError and IndexError
            raise ModelError(f"{file}: tensor {key} cannot be read ({error}); download the file again") from error
        return tensor


def open_source(folder: Path, *, weights: bool = True) -> CheckpointSource:
    """Read config and tensor names of a checkpoint; no weights yet. Raises ModelError naming what is wrong.

    Without ``weights`` only the config is read; the result serves for planning.
    """
    api.quiet()
    config = api.read_config(folder)
    files = tensor_files(folder) if weights else {}
    dtype = api.default_dtype(config, folder)
    model = api.build_meta_model(config, dtype)
    experts = api.find_experts(model)
    sources, rest = api.sort_checkpoint(model, experts, files) if weights else ({}, [])
    return CheckpointSource(folder, config, dtype, model, experts, files, sources, rest)


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor, by the index where there is one, else by the files' own headers.

    Raises ModelError for a damaged index, a missing shard, and files that the index does not match.
    """
    index = folder / INDEX_FILE
    listed: dict[str, str] | None = None
    if index.exists():
        try:
            listed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            if not all(isinstance(name, str) for name in listed.values()):
                raise TypeError("a file name is no text")
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{index}: the index is damaged ({error}); download it again") from error
    names = sorted(set(listed.values())) if listed else sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise ModelError(f"{folder}: there are no .safetensors files; only safetensors checkpoints are loaded")
    found: dict[str, Path] = {}
    for name in names:
        if not (folder / name).exists():
            raise ModelError(f"{folder}: {name} is missing, though {INDEX_FILE} lists it; download it again")
        handle = api.open_safetensors(folder / name)
        found |= dict.fromkeys(handle.keys(), folder / name)
    lost = sorted(set(listed or ()) - found.keys())
    if lost:
        raise ModelError(f"{folder}: tensor {lost[0]} is in {INDEX_FILE} but in no file; download the files again")
    return {key: found[key] for key in listed} if listed else found
