"""Is this folder a checkpoint that can be run? Looks at names, the config and the index; reads no weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from offload.errors import ModelError

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
MISTRAL_CONFIG = "params.json"
MISTRAL_INDEX_FILE = "consolidated.safetensors.index.json"
_MISTRAL_WEIGHTS = "consolidated"
MODELOPT_FILE = "hf_quant_config.json"
_ADAPTER_CONFIG = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# A clone without Git LFS leaves a text of about 130 bytes in place of each large file.
_LFS_POINTER_START = b"version http"
_LFS_POINTER_MAX_BYTES = 1024


def check_model_folder(folder: Path, weights: bool = True) -> None:
    """Raise ModelError unless ``folder`` holds a config and, with ``weights``, every safetensors file of the model.

    A GGUF file, or a folder that has one and no safetensors, needs nothing else.
    """
    if folder.is_file() and folder.suffix == ".gguf":
        return
    if not folder.is_dir():
        there = f"its folder: --model {folder.parent}" if (folder.parent / CONFIG_FILE).exists() else ""
        raise ModelError(f"--model: '{folder}' is not a folder; give {there or f'the folder that holds {CONFIG_FILE}'}")
    if any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")):
        return
    names = [path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*"))]
    if _is_adapter(names) or not config_path(folder).exists():
        raise ModelError(no_model_message(str(folder), names))
    read_json_object(config_path(folder))
    if weights:
        _check_weights(folder)


def has_mistral_layout(folder: Path) -> bool:
    """Whether the weights in a folder are in Mistral's own layout: ``params.json``, ``consolidated*.safetensors``.

    Where they stand in transformers' layout, too, that one is taken.
    """
    if not (folder / MISTRAL_CONFIG).exists():
        return False
    return are_mistrals(file.name for file in folder.glob("*.safetensors")) or not (folder / CONFIG_FILE).exists()


def are_mistrals(names: Iterable[str]) -> bool:
    """Whether these are files of weights, all in Mistral's own layout."""
    return {name.startswith(_MISTRAL_WEIGHTS) for name in names} == {True}


def config_path(folder: Path) -> Path:
    """The file that describes the model."""
    return folder / (MISTRAL_CONFIG if has_mistral_layout(folder) else CONFIG_FILE)


def index_path(folder: Path) -> Path:
    """The file that says where each tensor is, if there is one."""
    return folder / (MISTRAL_INDEX_FILE if has_mistral_layout(folder) else INDEX_FILE)


def choose_weights(names: Iterable[str]) -> tuple[str, ...]:
    """The weight files of a model without an index: one file, else all that do not repeat the weights."""
    found = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if "model.safetensors" in found:
        return ("model.safetensors",)
    # Some vendors publish the same weights a second time in their own layout.
    return tuple(sorted(name for name in found if not name.startswith(_MISTRAL_WEIGHTS))) or tuple(sorted(found))


def side_folder(path: Path) -> Path:
    """Where the config and the tokenizer of a checkpoint are: the folder itself, or that of a GGUF file."""
    return path.parent if path.is_file() else path


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises ModelError, naming the file, when it is missing or anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"'{path.parent}' is not a model folder: it has no {path.name}") from error
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise ModelError(f"{path} is damaged: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is damaged: not a JSON object")
    return value


def shard_names(index_path: Path) -> tuple[str, ...]:
    """The names of the files that an index lists, sorted. Raises ModelError for a damaged index."""
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index_path} is damaged: it has no weight_map")
    names = set(weight_map.values())
    for name in names:
        # A name must stay inside the folder: an index is data from a stranger.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index_path} is damaged: '{name}' is not the name of a safetensors file")
    return tuple(sorted(names))


def no_model_message(name: str, files: Iterable[str]) -> str:
    """One line that says why a folder without a config is no model that can be run, by what it has instead."""
    names = set(files)
    inner = sorted(file.removesuffix(f"/{CONFIG_FILE}") for file in names if file.endswith(f"/{CONFIG_FILE}"))
    if _ADAPTER_CONFIG in names:
        return (
            f"'{name}' is an adapter (LoRA), no model, and adapters are not applied; merge it into its model (peft: "
            "merge_and_unload, save_pretrained) and give that folder"
        )
    if "model_index.json" in names:
        return f"'{name}' makes pictures (model_index.json): it is no language model, and only those are run"
    if any(file.endswith(".onnx") for file in names):
        return f"'{name}' has the model as ONNX, which is not read; take the one with {CONFIG_FILE} and *.safetensors"
    reason = f"'{name}' is not a model folder: it has no {CONFIG_FILE}"
    return f"{reason}; its folder '{inner[0]}' has one" if inner else reason


def _is_adapter(names: Iterable[str]) -> bool:
    names = set(names)
    weights = {name for name in names if name.endswith(".safetensors")}
    return _ADAPTER_CONFIG in names and all(name.startswith("adapter_") for name in weights)


def no_safetensors_message(name: str, files: Iterable[str]) -> str:
    """One line that says why a model without safetensors cannot be run, by what it has instead."""
    suffixes = {Path(file).suffix for file in files}
    if suffixes.intersection(_PICKLES):
        reason = (
            "has only pickled weights (.bin, .pt), which can run code; only safetensors are loaded: take a conversion, "
            "or make one of .bin files, which runs nothing: python -m offload.checkpoint.unpickle FOLDER OUTPUT"
        )
    elif ".onnx" in suffixes:
        reason = "has the model as ONNX, which is not read; take the one with *.safetensors"
    elif suffixes & {".h5", ".msgpack"}:
        reason = "has only weights for TensorFlow or Flax; take the checkpoint with *.safetensors"
    elif ".gguf" in suffixes:
        reason = "has only GGUF weights; download one of its files and name it: --model FILE.gguf"
    else:
        reason = "has no *.safetensors weights"
    return f"'{name}' {reason}"


def _check_weights(folder: Path) -> None:
    index = index_path(folder)
    if index.exists():
        names = shard_names(index)
    else:
        names = choose_weights(path.name for path in folder.glob("*.safetensors"))
        if not names:
            raise ModelError(no_safetensors_message(str(folder), (path.name for path in folder.rglob("*"))))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"'{folder}' is incomplete: {missing[0]}{more} of {len(names)} weight files missing")
    for name in names:
        _refuse_lfs_pointer(folder / name)


def _refuse_lfs_pointer(path: Path) -> None:
    try:
        if path.stat().st_size > _LFS_POINTER_MAX_BYTES:
            return
        start = path.read_bytes()[: len(_LFS_POINTER_START)]
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    if start == _LFS_POINTER_START:
        raise ModelError(f"{path} is a Git LFS pointer, not weights; run 'git lfs pull' in the folder")
