"""From the value of ``--model`` to a folder on this machine: an existing folder, or a download from the hub.

A download takes only what a text model needs: config, tokenizer and the safetensors files that its index names. It
lands in the hub's usual cache (``HF_HOME``), so other programs share it. A download that broke off goes on where it
stopped: inside one run in the middle of a file, in a later run with the first file that is not complete.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from offload.checkpoint.hub_transfer import explain, fetch
from offload.checkpoint.model_folder import (
    CONFIG_FILE,
    INDEX_FILE,
    MISTRAL_CONFIG,
    MISTRAL_INDEX_FILE,
    MODELOPT_FILE,
    are_mistrals,
    check_model_folder,
    choose_weights,
    no_model_message,
    no_safetensors_message,
    shard_names,
)
from offload.config import format_size
from offload.errors import ModelError, UsageError
from offload.events import LoadProgress, Notice

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

OnEvent = Callable[[LoadProgress | Notice], None]

_SMALL_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    INDEX_FILE,
    MISTRAL_CONFIG,
    MISTRAL_INDEX_FILE,
    MODELOPT_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*.jinja",
    "chat_template*.json",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# Room that must stay after a download: a file system filled to the last byte breaks other programs.
_DISK_MARGIN_BYTES = 256 * 2**20


@dataclass(frozen=True)
class ResolvedModel:
    """A model on this machine.

    ``name`` is the hub id, or the folder's name; ``folder`` holds config, tokenizer and weights; ``revision`` is the
    commit hash of a hub snapshot and None for a folder.
    """

    name: str
    folder: Path
    revision: str | None


def resolve_model(
    model: str, *, revision: str | None, offline: bool, on_event: OnEvent, weights: bool = True
) -> ResolvedModel:
    """Find ``model``, downloading it if need be, and check that all its files are there.

    An existing folder, or anything that starts like a path, is a folder; all else must be a hub id ``org/name``.
    ``offline`` (or ``HF_HUB_OFFLINE``) uses the hub's cache alone. Without ``weights`` only config, index and
    tokenizer are fetched and checked. ``on_event`` is called on the calling thread; the stage is ``download``.

    Raises UsageError for a value that can be neither, and ModelError for all that can be wrong with the model, the
    hub, the network or the disk.
    """
    if _is_path(model):
        if revision is not None:
            raise UsageError("--revision goes with a hub id (org/name), not with a folder")
        folder = Path(model).expanduser()
        if not folder.exists():
            raise ModelError(f"--model: the {'file' if model.endswith('.gguf') else 'folder'} '{model}' does not exist")
        check_model_folder(folder, weights)
        return ResolvedModel(folder.resolve().name, folder, None)
    if not _HUB_ID.fullmatch(model) or ".." in model or "--" in model:
        raise UsageError(f"--model: '{model}' is neither an existing folder nor a hub id (org/name)")

    from huggingface_hub import is_offline_mode

    if offline or is_offline_mode():
        cached = _from_cache(model, revision, weights)
        if cached is None:
            raise ModelError(
                f"model '{model}' is not in the cache, and the hub is switched off (--offline or HF_HUB_OFFLINE); "
                "run once with the hub to download it"
            )
        return cached
    return _from_hub(model, revision, on_event, weights)


def choose_files(names: Iterable[str], shards: Iterable[str] | None) -> tuple[str, ...]:
    """Which of a repository's files to fetch, sorted: never code, never pickles, nothing in subfolders.

    ``shards`` are the weight files that the index names; None leaves the weights out. Without an index they are
    chosen by :func:`choose_weights`.
    """
    small = {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in _SMALL_FILES)}
    return tuple(sorted({name for name in small if "/" not in name} | set(shards or ())))


def _is_path(model: str) -> bool:
    return (
        model.startswith(("/", "./", "../", "~"))
        or model.endswith(".gguf")
        or model in (".", "..")
        or Path(model).is_dir()
    )


def _from_hub(name: str, revision: str | None, on_event: OnEvent, weights: bool) -> ResolvedModel:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except Exception as error:
        problem = explain(error, name, revision)
        cached = None if isinstance(error, RevisionNotFoundError) else _from_cache(name, revision, weights)
        if cached is None:
            raise problem from error
        on_event(Notice(f"{problem}. Using the copy in the cache"))
        return cached

    files = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    if CONFIG_FILE not in files and MISTRAL_CONFIG not in files:
        raise ModelError(no_model_message(name, files))
    shards = _weight_files(name, info.sha, files) if weights else None
    wanted = choose_files(files, shards)
    total = sum(files[file].size or 0 for file in wanted)
    present = sum(files[file].size or 0 for file in wanted if _is_cached(name, info.sha, files[file]))
    _check_disk(name, total - present)
    if total > present:
        on_event(Notice(f"downloading {name}: {format_size(total - present)} to {_cache_folder()}"))
    folder = fetch(name, revision, wanted, present, total, on_event)
    check_model_folder(folder, weights)
    return ResolvedModel(name, folder, folder.name)


def _weight_files(name: str, commit: str | None, files: dict[str, RepoSibling]) -> tuple[str, ...]:
    """The weight files to fetch. Reads the index, which is small, before anything large is asked for."""
    chosen = choose_weights(files)
    index_file = MISTRAL_INDEX_FILE if are_mistrals(chosen) else INDEX_FILE
    if index_file not in files:
        if not chosen:
            raise ModelError(no_safetensors_message(name, files))
        return chosen

    from huggingface_hub import hf_hub_download

    try:
        index = hf_hub_download(name, index_file, revision=commit)
    except Exception as error:
        raise explain(error, name, commit) from error
    found = shard_names(Path(index))
    missing = [file for file in found if file not in files]
    if missing:
        raise ModelError(f"'{name}' is incomplete on the hub: its index names {missing[0]}, which is not there")
    return found


def _from_cache(name: str, revision: str | None, weights: bool) -> ResolvedModel | None:
    """The snapshot in the hub's cache; None without one. Raises ModelError for one that is not complete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                name, revision=revision, local_files_only=True, allow_patterns=[CONFIG_FILE, MISTRAL_CONFIG]
            )
        )
    except LocalEntryNotFoundError:
        return None
    try:
        check_model_folder(folder, weights)
    except ModelError as error:
        raise ModelError(f"{error}; the copy of '{name}' in the cache cannot be used without the hub") from error
    return ResolvedModel(name, folder, folder.name)


def _cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def _is_cached(name: str, commit: str | None, file: RepoSibling) -> bool:
    """Whether a file need not be fetched: it is in this snapshot, or its content is there from another one."""
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, file.rfilename, revision=commit), str):
        return True
    content = file.lfs.sha256 if file.lfs is not None else file.blob_id
    # The cache's documented layout: contents are stored once, under their hash.
    return content is not None and (_cache_folder() / f"models--{name.replace('/', '--')}" / "blobs" / content).exists()


def _check_disk(name: str, needed: int) -> None:
    """Raise ModelError when the cache's file system has no room for ``needed`` bytes."""
    if needed <= 0:
        return
    folder = _cache_folder()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed + _DISK_MARGIN_BYTES > free:
        raise ModelError(
            f"no room for '{name}': the download needs {format_size(needed)} and {existing} has {format_size(free)} "
            "free; make room, or point HF_HOME at another disk"
        )
