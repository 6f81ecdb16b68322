"""Opens engines for a front end that switches between models. Imports torch only when it opens one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from offload.config import EngineSettings
from offload.errors import RunLocalError
from offload.protocol import ChatEngine, LiveEngine, ModelChoice, OnLoad

if TYPE_CHECKING:
    from offload.checkpoint.library import PackInfo


class LocalHost:
    """Implements :class:`offload.protocol.EngineHost` on this machine.

    ``stats_json``: where the statistics of an engine go when it is closed; the last one's stay.
    """

    def __init__(self, stats_json: Path | None = None, experts_dir: Path | None = None) -> None:
        self._stats_json = stats_json
        self._experts_dir = experts_dir

    def open(self, settings: EngineSettings, on_event: OnLoad) -> LiveEngine:
        from offload.engine import open_engine

        return open_engine(settings, on_event)

    def close(self, engine: LiveEngine) -> None:
        try:
            engine.close()
        finally:
            write_stats(engine, self._stats_json)

    def models(self) -> list[ModelChoice]:
        """The demo first, then models by name, each in the formats that it is packed in."""
        from offload.checkpoint.cached_models import cached_models
        from offload.checkpoint.library import list_packs
        from offload.demo import DEMO_NAME

        packs = [pack for pack in list_packs(self._experts_dir) if pack.complete]
        choices = [ModelChoice(DEMO_NAME, "demo", "", None, "small, built on first use, works offline then")]
        choices += [_packed(pack) for pack in packs if pack.model == DEMO_NAME]
        for name, size in cached_models():
            choices.append(ModelChoice(name, "hub cache", "", size, "packed on first use"))
            choices += [_packed(pack) for pack in packs if pack.model == name]
        return choices


def _packed(pack: PackInfo) -> ModelChoice:
    return ModelChoice(pack.model, "pack", pack.format, pack.bytes, f"{pack.experts} experts")


def write_stats(engine: ChatEngine, path: Path | None, further: Mapping[str, object] | None = None) -> None:
    """Write the session's statistics to ``path``, if there is one, with what ``further`` holds.

    Raises RunLocalError if it cannot be written.
    """
    if path is None:
        return
    text = json.dumps({**engine.stats().to_json(), **(further or {})}, ensure_ascii=False, indent=2) + "\n"
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise RunLocalError(f"--stats-json: {path} cannot be written ({error.strerror})") from error
