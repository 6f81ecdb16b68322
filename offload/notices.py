"""What a user is told of a checkpoint before it is loaded."""

from __future__ import annotations

from offload.checkpoint.library import OnEvent
from offload.checkpoint.source import CheckpointSource
from offload.config import EngineSettings
from offload.events import Notice


def say_what_is_run(settings: EngineSettings, name: str, source: CheckpointSource, on_event: OnEvent) -> None:
    """What of a multimodal checkpoint is left out, and what becomes of the weights of a quantised one."""
    _say_left_out(name, source, on_event)
    _say_quantised(settings, name, source, on_event)


def _say_left_out(name: str, source: CheckpointSource, on_event: OnEvent) -> None:
    """What of a multimodal checkpoint is not run."""
    if source.left_out:
        what = " and ".join(source.left_out)
        on_event(
            Notice(f"{name} is run as a text model: its {what} part is left out, neither loaded nor packed nor counted")
        )


def _say_quantised(settings: EngineSettings, name: str, source: CheckpointSource, on_event: OnEvent) -> None:
    """What becomes of the weights of a quantised checkpoint."""
    if source.method is None:
        return
    experts = "stay as published" if settings.format == "native" else f"are packed as {settings.format}"
    dtype = str(source.dtype).removeprefix("torch.")
    rest = f"the other weights are held in {dtype} (--dense-format int8 makes them smaller)"
    if settings.dense_format != "native":
        rest = f"the other matrices are held in {settings.dense_format}"
    on_event(Notice(f"{name} is quantised ({source.method.name}): its experts {experts}, {rest}"))
