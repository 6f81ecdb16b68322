"""Packs on disk: find, make, list and remove them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from offload.checkpoint.journal import JOURNAL_NAME, PARTIAL_SUFFIX
from offload.checkpoint.lock import pack_lock
from offload.checkpoint.manifest import DENSE_FILE_NAMES, EXPERT_FILE_NAME, MANIFEST_NAME, Manifest
from offload.config import EngineSettings, format_size
from offload.errors import ExpertFileError, UsageError
from offload.events import LoadProgress, Notice
from offload.paths import packs_folder

if TYPE_CHECKING:
    from offload.checkpoint.source import CheckpointSource

_LONGEST_NAME = 100  # of the readable part: most file systems take 255 bytes
OnEvent = Callable[[LoadProgress | Notice], None]


@dataclass(frozen=True, slots=True)
class PackInfo:
    """One pack. ``bytes`` is its size on disk; an incomplete one has no model, format or experts to tell of.

    ``errors`` has a pair (layer, relative error as in the manifest) for each layer that was quantised.
    """

    name: str
    folder: Path
    model: str
    revision: str | None
    format: str
    bytes: int
    experts: int
    complete: bool
    errors: tuple[tuple[int, float], ...] = ()


def list_packs(root: Path | None = None) -> list[PackInfo]:
    """All packs under ``root`` (default: the user's cache folder), incomplete and damaged ones included, by name.

    ``root`` may be a pack itself. Folders that hold nothing of a pack are left out.
    """
    root = root or packs_folder()
    try:
        if not root.is_dir():
            return []
        folders = [root] if _is_pack(root) else [folder for folder in sorted(root.iterdir()) if folder.is_dir()]
    except OSError as error:
        raise ExpertFileError(f"{root}: cannot be read ({error.strerror})") from error
    return [_describe(folder) for folder in folders if _is_pack(folder)]


def remove_pack(name: str, root: Path | None = None) -> PackInfo:
    """Delete a pack: the files that packing wrote, nothing else. Raises UsageError naming the packs there are.

    Raises ExpertFileError if a process is packing it now, or if it cannot be removed; then it is listed as incomplete.
    """
    packs = list_packs(root)
    found = next((pack for pack in packs if pack.name == name), None)
    if found is None:
        there = ", ".join(pack.name for pack in packs) or "none"
        raise UsageError(f"--remove: there is no pack '{name}'; there are: {there}")
    folder = found.folder
    with pack_lock(folder.with_name(folder.name.removesuffix(PARTIAL_SUFFIX))):
        try:
            # the manifest first: a half-removed pack must not look whole
            dense = [name + ending for name in DENSE_FILE_NAMES.values() for ending in ("", PARTIAL_SUFFIX)]
            for file in (MANIFEST_NAME, *dense, EXPERT_FILE_NAME, JOURNAL_NAME, f"{JOURNAL_NAME}.new"):
                (folder / file).unlink(missing_ok=True)
            folder.resolve().rmdir()
            if folder.is_symlink():
                folder.unlink()
        except OSError as error:
            raise ExpertFileError(f"{error.filename or folder}: cannot be removed ({error.strerror})") from error
    return found


def pack_model(settings: EngineSettings, on_event: OnEvent, output: Path | None = None) -> PackInfo:
    """Pack ``settings.model`` (download or build it first where needed) and return the pack, new or already there.

    ``output`` names the pack's folder; by default it goes where ``chat`` and ``batch`` look for it.
    """
    from offload.checkpoint.dense_file import ensure_dense
    from offload.checkpoint.expert_file import ExpertFile
    from offload.checkpoint.resolve import resolve
    from offload.checkpoint.source import open_source

    resolved = resolve(settings, on_event)
    source = open_source(resolved.folder)
    folder = ensure_pack(
        source, resolved.name, resolved.revision, settings.format, settings.experts_dir, on_event, output
    )
    ExpertFile(folder).close()  # one that was there already may have lost its end
    if dense := ensure_dense(source, folder, resolved.name, settings.dense_format, on_event):
        dense.close()
    return _describe(folder)


def ensure_pack(
    source: CheckpointSource,
    name: str,
    revision: str | None,
    format_name: str,
    experts_dir: Path | None,
    on_event: OnEvent,
    output: Path | None = None,
) -> Path:
    """Folder of the pack of ``source``; packs it, saying so with its size, if there is none yet.

    ``experts_dir`` may be a pack itself or a folder of packs. Raises ExpertFileError if a pack named there belongs to
    another model or checkpoint.
    """
    from offload.checkpoint.pack import pack, plan_manifest

    wanted = plan_manifest(source, name, revision, format_name)
    folder = output
    if folder is None and experts_dir is not None and (experts_dir / MANIFEST_NAME).exists():
        folder = experts_dir
    if folder is None:
        folder = (experts_dir or packs_folder()) / pack_name(wanted)
    folder = Path(os.path.abspath(folder))
    if folder.name.endswith(PARTIAL_SUFFIX):
        raise UsageError(
            f"{folder}: the ending {PARTIAL_SUFFIX} marks a pack that is not complete; choose another name"
        )
    if (folder / MANIFEST_NAME).exists():
        check_pack(folder, Manifest.read(folder), wanted)
        return folder
    if folder.is_dir() and _is_pack(folder):
        raise ExpertFileError(f"{folder}: a pack without {MANIFEST_NAME} (half removed?); remove this folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists and is no pack; choose another folder")
    on_event(
        Notice(
            f"packing the experts of {name} into {folder}: {wanted.num_records} records, "
            f"{format_size(wanted.total_bytes)} (once; later starts use the pack)"
        )
    )
    check_pack(folder, pack(source, wanted, folder, on_event), wanted)
    return folder


def check_pack(folder: Path, found: Manifest, wanted: Manifest) -> None:
    """Raises ExpertFileError, saying what differs, unless the pack was made from this checkpoint in this format."""
    if found.fingerprint != wanted.fingerprint or found.model_type != wanted.model_type:
        raise ExpertFileError(
            f"{folder}: this pack was made from another checkpoint ({found.model}, {found.model_type}); "
            f"remove it or name another folder for {wanted.model}"
        )
    if found.format != wanted.format:
        raise ExpertFileError(
            f"{folder}: the format of this pack is {found.format}, not {wanted.format}; use --format {found.format}, "
            "or name another folder"
        )
    if difference := _difference(found, wanted):
        raise ExpertFileError(
            f"{folder}: laid out for another version of run-local ({difference}); remove it and pack again"
        )


def _difference(found: Manifest, wanted: Manifest) -> str | None:
    """The first difference between the records of two packs of one checkpoint and format, or None."""
    modules = [[(layer.layer, layer.path, layer.experts) for layer in manifest.layers] for manifest in (found, wanted)]
    if modules[0] != modules[1]:
        return "its layers are others than the model's"
    for mine, theirs in zip(found.layers, wanted.layers, strict=True):
        layouts = found.layouts[mine.layout], wanted.layouts[theirs.layout]
        here, there = ({t.name: f"{t.dtype} {list(t.shape)}" for t in layout.tensors} for layout in layouts)
        for name in sorted(here.keys() | there.keys()):
            if here.get(name) != there.get(name):
                return (
                    f"layer {mine.layer}, {name}: {here.get(name, 'nothing')} instead of {there.get(name, 'nothing')}"
                )
        if layouts[0] != layouts[1] or mine.offset != theirs.offset:
            return f"layer {mine.layer}: its tensors stand at other places"
    return None


def pack_name(manifest: Manifest) -> str:
    """A folder name that people recognise and that no other checkpoint has: ``org--model-1a2b3c4d-native``."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "--", manifest.model).strip("-.") or "model"
    return f"{readable[:_LONGEST_NAME]}-{manifest.fingerprint[:8]}-{manifest.format}"


def _is_pack(folder: Path) -> bool:
    """Whether ``folder`` holds something that packing wrote; other people's folders may stand beside the packs."""
    try:
        names = {file.name for file in folder.iterdir()}
    except OSError:
        return False
    if EXPERT_FILE_NAME in names or JOURNAL_NAME in names:
        return True
    if not names:
        return folder.name.endswith(PARTIAL_SUFFIX)  # just begun
    try:
        Manifest.read(folder)
    except ExpertFileError:
        return False
    return True


def _describe(folder: Path) -> PackInfo:
    blocks = length = 0
    try:
        blocks = sum(file.stat().st_blocks for file in folder.iterdir())
        length = (folder / EXPERT_FILE_NAME).stat().st_size
        manifest = Manifest.read(folder)
    except (ExpertFileError, OSError):  # damaged, or another process is changing it now
        return PackInfo(folder.name, folder, "-", None, "-", blocks * 512, 0, complete=False)
    return PackInfo(
        folder.name,
        folder,
        manifest.model,
        manifest.revision,
        manifest.format,
        blocks * 512,
        manifest.num_records,
        complete=length == manifest.total_bytes and not folder.name.endswith(PARTIAL_SUFFIX),
        errors=tuple(
            (layer.layer, error)
            for layer, error in zip(manifest.layers, manifest.errors, strict=True)
            if error is not None
        ),
    )
