"""From what the user calls a model to a checkpoint folder."""

from __future__ import annotations

from collections.abc import Callable

from offload.checkpoint.hub import ResolvedModel, resolve_model
from offload.config import EngineSettings
from offload.events import LoadProgress, Notice
from offload.paths import cache_folder


def resolve(
    settings: EngineSettings, on_event: Callable[[LoadProgress | Notice], None], *, weights: bool = True
) -> ResolvedModel:
    """The checkpoint folder of ``settings.model``: a folder, a hub id, or ``demo``, which is built on first use.

    Without ``weights`` a hub model's weights are not downloaded. Raises RunLocalError with the remedy.
    """
    from offload.demo import DEMO_NAME, ensure_demo

    if settings.model == DEMO_NAME:
        folder = ensure_demo(
            cache_folder() / "demo",
            progress=lambda stage, done, total: on_event(
                LoadProgress(stage, done, total, "bytes" if "download" in stage else "steps")
            ),
            offline=settings.offline,
        )
        return ResolvedModel(name=DEMO_NAME, folder=folder, revision=None)
    return resolve_model(
        settings.model, revision=settings.revision, offline=settings.offline, on_event=on_event, weights=weights
    )
