"""Opens engines on tiny checkpoints, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from offload.config import EngineSettings, SamplingSettings
from offload.engine import Engine, open_engine
from offload.events import Done, Event

GREEDY = SamplingSettings(temperature=0, max_new_tokens=8)


def open_tiny(checkpoint: Path, packs: Path, **settings: Any) -> Engine:
    """An engine on ``checkpoint`` with a small context; its pack goes below ``packs``."""
    settings = {"context_tokens": 128, "experts_dir": packs} | settings
    return open_engine(EngineSettings(model=str(checkpoint), **settings), lambda event: None)


def finish(stream: Any) -> tuple[list[Event], Done]:
    """All events of a generation, and the last."""
    events = list(stream)
    assert isinstance(events[-1], Done)
    assert sum(isinstance(event, Done) for event in events) == 1
    return events, events[-1]
