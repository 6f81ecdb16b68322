"""A GGUF file as a checkpoint: its config, and its tensors under the names that the model has for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from offload.checkpoint.config_file import read_config, read_gguf_config
from offload.checkpoint.formats.gguf import BLOCKS, GgufLayout
from offload.checkpoint.formats.method import Method, Read
from offload.checkpoint.formats.packed import Entries, PackedLayout, PackedTensor
from offload.checkpoint.gguf_file import GgufHeader, GgufTensor, gguf_files, read_header
from offload.checkpoint.gguf_names import Change, Compose, check_package, get_architecture, name_tensors
from offload.checkpoint.model_folder import CONFIG_FILE
from offload.checkpoint.reading import KnownPlace
from offload.errors import ModelError
from offload.model import transformers_api as api
from offload.model import transformers_weights as tw

_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64}
_FROM_METADATA = {  # what transformers' own reading of these files leaves out
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attention.key_length": "head_dim",
}


class GgufMethod(Method):
    """Stands for the method of a quantised checkpoint; what is packed is found by :func:`open_gguf`."""

    name = "gguf"

    def find(self, entries: Entries, read: Read) -> dict[str, PackedTensor]:
        return {}

    def predict(self, shape: tuple[int, int], dtype: torch.dtype, transposed: bool) -> PackedLayout | None:
        return None


@dataclass
class GgufCheckpoint:
    """``files`` of the parts; ``header`` is that of the first. ``tensors`` and ``file_of`` go by the file's names.

    Once :meth:`sort` was called, ``places`` has all tensors by the file's names and the model's, and ``changes`` what
    makes those of the file into those of the model where they are not the same; ``composed`` are those that are made of
    several.
    """

    files: tuple[Path, ...]
    header: GgufHeader
    file_of: dict[str, Path]
    tensors: dict[str, GgufTensor]
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    composed: dict[str, tuple[tuple[str, ...], Compose]] = field(default_factory=dict)
    places: dict[str, KnownPlace] = field(default_factory=dict)

    @property
    def is_quantised(self) -> bool:
        return any(tensor.kind not in _PLAIN for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """Of the model, where no config says it."""
        kinds = {tensor.kind for tensor in self.tensors.values()}
        if kinds == {0}:
            return torch.float32
        return torch.float16 if kinds <= {0, 1} else torch.bfloat16

    def config(self) -> PretrainedConfig:
        """From the ``config.json`` beside the file, else from what the file says. Raises ModelError if neither does."""
        path = self.files[0]
        check_package()
        architecture = get_architecture(self.header.architecture)
        if (path.parent / CONFIG_FILE).exists():
            config = read_config(path.parent)
            get_architecture(self.header.architecture, config.get_text_config().model_type)
            return config
        config = read_gguf_config(path, architecture.model_types)
        for key, name in _FROM_METADATA.items():
            value = self.header.metadata.get(f"{self.header.architecture}.{key}")
            if value is not None and hasattr(config, name):
                setattr(config, name, value)
        config.dtype = self.dtype
        return config

    def sort(
        self, model: Any, experts: list[api.ExpertsModule]
    ) -> tuple[dict[tuple[str, str], tw.TensorSource], dict[str, str], dict[str, PackedTensor]]:
        """As :func:`offload.checkpoint.gguf_names.name_tensors`, and the packed tensors by the same names."""
        architecture = self.header.architecture
        sources, skeleton = name_tensors(model, experts, architecture, self.tensors)
        packed = {}
        self.composed = self._find_composed(model)
        parts = [key for keys, _ in self.composed.values() for key in keys]
        stacked = {key for source in sources.values() for keys in source.keys.values() for key in keys}
        for name, key in (skeleton | {key: key for key in (*stacked, *parts)}).items():
            tensor = self.tensors[key]
            if tensor.kind in _PLAIN:
                continue
            if tensor.kind not in BLOCKS:
                raise ModelError(f"{self.file_of[key]}: tensor {key} has the ggml type {tensor.kind}, which is unknown")
            *stack, rows, columns = (1, *tensor.shape) if len(tensor.shape) == 1 else tensor.shape
            kind, weights, _ = BLOCKS[tensor.kind]
            if columns % weights or len(stack) > 1:
                raise ModelError(f"{self.file_of[key]}: tensor {key} {list(tensor.shape)} does not fit {kind}")
            packed[name] = PackedTensor(GgufLayout((rows, columns), kind), (key,), stack[0] if stack else None)
        self.places = {key: self._place(key) for key in self.tensors}
        self.places |= {name: self.places[key] for name, key in skeleton.items()}
        self.places |= {name: self.places[keys[0]] for name, (keys, _) in self.composed.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        config = model.config.get_text_config()
        changes = get_architecture(architecture).changes
        for name, key in skeleton.items():
            change = next((change for end, change in changes.items() if name.endswith(end)), None)
            if change is not None:
                self.changes[name] = partial(_changed, change=change, config=config)
            elif self.tensors[key].shape != shapes[name] and _same_size(self.tensors[key].shape, shapes[name]):
                self.changes[name] = partial(_reshaped, shape=shapes[name])
        return sources, skeleton | {name: keys[0] for name, (keys, _) in self.composed.items()}, packed

    def _find_composed(self, model: Any) -> dict[str, tuple[tuple[str, ...], Compose]]:
        found = {}
        for name in model.state_dict():
            for end, (parts, compose) in get_architecture(self.header.architecture).composed.items():
                layer = name.removesuffix(end).rpartition("layers.")[2].rstrip(".")
                keys = tuple(f"blk.{layer}.{part}" for part in parts)
                if name.endswith(end) and all(key in self.tensors for key in keys):
                    found[name] = keys, compose
        return found

    def _place(self, key: str) -> KnownPlace:
        tensor = self.tensors[key]
        if tensor.kind in _PLAIN:
            return KnownPlace(tensor.offset, _PLAIN[tensor.kind], tensor.shape)
        _, weights, size = BLOCKS.get(tensor.kind, ("", 1, 1))
        return KnownPlace(tensor.offset, torch.uint8, (*tensor.shape[:-1], tensor.shape[-1] // weights * size))


def open_gguf(path: Path) -> GgufCheckpoint | None:
    """The GGUF model at ``path``; None for a folder that holds safetensors, or no GGUF file."""
    if path.is_dir() and any(path.glob("*.safetensors")):
        return None
    files = gguf_files(path)
    if not files:
        return None
    headers = [read_header(file) for file in files]
    tensors: dict[str, GgufTensor] = {}
    file_of: dict[str, Path] = {}
    for file, header in zip(files, headers, strict=True):
        for tensor in header.tensors:
            tensors[tensor.name], file_of[tensor.name] = tensor, file
    return GgufCheckpoint(files, headers[0], file_of, tensors)


def _changed(weight: torch.Tensor, change: Change, config: Any) -> torch.Tensor:
    return change(weight, config)


def _reshaped(weight: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return weight.reshape(shape)


def _same_size(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return torch.Size(one).numel() == torch.Size(other).numel()
