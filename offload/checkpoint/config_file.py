"""What a checkpoint's files say before any weight is read: its config, and the dtype of its model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from offload.checkpoint.model_folder import CONFIG_FILE, read_json_object
from offload.errors import ModelError
from offload.model.families.known import what_runs_instead
from offload.model.families.names import known_model_type


def read_config(folder: Path) -> PretrainedConfig:
    """The checkpoint's config. Raises ModelError if it cannot be read or needs code from the checkpoint."""
    said = read_json_object(folder / CONFIG_FILE)
    known = known_model_type(said)
    name = said.get("model_type")
    if known is None and not (isinstance(name, str) and name):
        raise ModelError(
            f"{folder / CONFIG_FILE}: it names no model_type, so it is no config of a model that transformers knows; "
            f"{what_runs_instead('')}"
        )
    if known is None and name not in CONFIG_MAPPING:
        code = "; the code that the checkpoint has for it is not run" if said.get("auto_map") else ""
        raise ModelError(
            f"{folder / CONFIG_FILE}: model_type '{name}' is unknown{code}; {what_runs_instead(str(name))}"
        )
    try:
        if known is not None:
            return CONFIG_MAPPING[known].from_dict(said | {"model_type": known})
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{folder / CONFIG_FILE}: the config cannot be used: {reason[:300]}") from error
    return config


def read_gguf_config(file: Path, model_types: Collection[str]) -> PretrainedConfig:
    """The config that transformers makes of a GGUF file's metadata. Raises ModelError if it is not one of these."""
    remedy = f"put config.json and the tokenizer's files of the original model into {file.parent}"
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"the config cannot be made from the file ({reason[:200]}); {remedy}") from error
    if config.model_type not in model_types:
        raise ModelError(f"the file does not say all about the model; {remedy}")
    return config


def default_dtype(config: PretrainedConfig, folder: Path, otherwise: torch.dtype | None = None) -> torch.dtype:
    """The dtype that ``dtype="auto"`` picks in transformers: the config's, or that of the first floating tensor.

    Tensors of 8 bits are codes, not weights. Without files it is bfloat16, which published models mostly have.
    """
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    if isinstance(dtype, torch.dtype):
        return dtype
    if otherwise is not None:
        return otherwise
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with open_safetensors(file) as handle:
            for key in handle.keys():  # noqa: SIM118 - the handle is no dict
                found: torch.dtype = handle.get_slice(key)[:0].dtype
                if found.is_floating_point and found.itemsize > 1:
                    return found
    return torch.float32 if files else torch.bfloat16


def open_safetensors(file: Path) -> Any:
    """A safetensors file read with pread: nothing of it stays mapped. Raises ModelError if it is damaged."""
    try:
        return safe_open(file, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: the file is damaged or incomplete ({error}); download it again") from error
