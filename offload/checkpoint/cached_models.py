"""Mixture-of-Experts models that are in the hub's cache already."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from offload.checkpoint.model_folder import config_path

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


def cached_models(folder: Path | None = None) -> list[tuple[str, int]]:
    """(hub id, bytes on disk) of the complete models with routed experts below ``folder`` (default: the hub's own).

    What cannot be read is left out.
    """
    if folder is None:
        from huggingface_hub.constants import HF_HUB_CACHE

        folder = Path(HF_HUB_CACHE)
    found = []
    with suppress(OSError):
        for entry in sorted(folder.glob("models--*--*")):
            snapshots = [path for path in (entry / "snapshots").glob("*") if _is_whole(path)]
            if snapshots and has_experts(_config(snapshots[-1])):
                name = entry.name.removeprefix("models--").replace("--", "/", 1)
                found.append((name, sum(path.stat().st_size for path in (entry / "blobs").glob("*"))))
    return found


def has_experts(config: dict[str, Any]) -> bool:
    """Whether a config is that of a model with several routed experts, in any of its parts."""
    for part in (config, config.get("text_config"), config.get("moe")):
        if isinstance(part, dict):
            for name in _EXPERT_COUNTS:
                count = part.get(name)
                if isinstance(count, int) and count > 1:
                    return True
    return False


def _is_whole(snapshot: Path) -> bool:
    return config_path(snapshot).exists() and any(snapshot.glob("*.safetensors"))


def _config(snapshot: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        config = json.loads(config_path(snapshot).read_text("utf-8"))
        if isinstance(config, dict):
            return config
    return {}
