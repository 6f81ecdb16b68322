"""Pickled checkpoints (``pytorch_model*.bin``) written anew as safetensors, without running what they may hold.

``python -m offload.checkpoint.unpickle FOLDER OUTPUT``. torch reads the tensors of a pickle and nothing else
(``weights_only``); a file that asks for more is refused. One file after the other, mapped, so little memory is needed.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from offload.checkpoint.model_folder import CONFIG_FILE, INDEX_FILE, read_json_object
from offload.config import format_size
from offload.errors import ModelError, RunLocalError

_INDEX = "pytorch_model.bin.index.json"
_BESIDE = (".json", ".model", ".txt", ".jinja", ".tiktoken")


def convert(folder: Path, output: Path) -> None:
    """Write the checkpoint in ``folder`` to ``output``, a new folder. Raises ModelError, also without room."""
    if output.exists():
        raise ModelError(f"{output}: it exists; name a new folder")
    read_json_object(folder / CONFIG_FILE)
    files = _files(folder)
    weight_map: dict[str, str] = {}
    try:
        output.mkdir(parents=True)
        needed, free = sum(file.stat().st_size for file in files), shutil.disk_usage(output).free
        if needed > free:
            output.rmdir()
            raise ModelError(f"{output}: this takes {format_size(needed)}, and only {format_size(free)} are free")
        for number, file in enumerate(files, 1):
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            tensors = _tensors(file)
            save_file(tensors, output / name, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
        for file in folder.iterdir():
            if file.suffix in _BESIDE and file.name != _INDEX:
                shutil.copy(file, output)
        index = {"metadata": {}, "weight_map": weight_map}
        (output / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{output}: cannot be written ({error}); remove it and try again") from error


def _files(folder: Path) -> list[Path]:
    if (folder / _INDEX).exists():
        names = sorted(set(read_json_object(folder / _INDEX)["weight_map"].values()))
    else:
        names = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ModelError(f"{folder}: {missing[0] if missing else 'pytorch_model.bin'} is missing; download it")
    return [folder / name for name in names]


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """Those of one file; what shares memory in the file stands by itself afterwards."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        tensors = {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
    except (pickle.UnpicklingError, RuntimeError, AttributeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ModelError(
            f"{file}: it is damaged, or holds more than tensors, which is not loaded ({reason})"
        ) from error
    seen: set[int] = set()
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone().contiguous() if pointer in seen else tensor.contiguous()
        seen.add(pointer)
    return tensors


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m offload.checkpoint.unpickle FOLDER OUTPUT", file=sys.stderr)
        return 2
    try:
        convert(Path(arguments[0]), Path(arguments[1]))
    except RunLocalError as error:
        print(f"run-local: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
