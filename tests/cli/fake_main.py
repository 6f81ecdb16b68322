"""The real command line with a scripted engine in place of the real one: ``python -m tests.cli.fake_main SCRIPT ...``.

What the scripts do is in :data:`SCRIPTS`; the engine's module is replaced before the command line imports it.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import run_local
from offload.checkpoint.library import PackInfo
from offload.config import EngineSettings
from offload.errors import BudgetError, ModelError, UsageError
from offload.events import LoadProgress, Notice
from tests.tui.fake_engine import Answer, FakeEngine

OnEvent = Callable[[LoadProgress | Notice], None]
SCRIPTS = {
    "good": [Answer(("A fine", " answer", "."))],
    "cut": [Answer(("one",) * 3, reason="length")],
    "fails": [Answer(("half",), error="expert file: record 3 of layer 2 cannot be read")],
    "waits": [Answer(("first", " second"), waits=True)],
    "waits-third": [Answer(), Answer(), Answer(("never",), waits=True)],
    "long": [Answer(("a line of text\n",) * 20000)],
    "bug": [Answer(raises=ZeroDivisionError("division by zero"))],
    "escape": [Answer(("a\x1b[31mb\x07", " \U0001f600 \u00e9"))],
}


class FakePlan:
    def rows(self) -> list[tuple[str, int, str]]:
        return [("skeleton", 2**30, "attention"), ("expert slots", 2**20, "10 of 20")]

    def summary(self) -> list[str]:
        return ["a budget of 2 GiB"]

    def to_json(self) -> dict[str, object]:
        return {"model": "fake", "bytes": {"skeleton": 2**30}}


def open_engine(settings: EngineSettings, on_event: OnEvent) -> FakeEngine:
    on_event(Notice(f"notice: {settings}"))
    on_event(LoadProgress("loading", 0, 100, "bytes"))
    on_event(LoadProgress("loading", 100, 100, "bytes"))
    if settings.model == "none":
        raise ModelError("none: there is no such model")
    if settings.model == "memory":
        raise MemoryError
    if settings.model == "interrupt":
        raise KeyboardInterrupt
    if settings.policy == "bad":
        raise UsageError("--policy: there is no policy 'bad'; there are lru, lfu")
    return FakeEngine(SCRIPTS[sys.argv[0]], context_tokens=settings.context_tokens or 1000)


def plan_model(settings: EngineSettings, on_event: OnEvent, hardware: str | None = None) -> FakePlan:
    if settings.ram == 2**20:
        raise BudgetError("--ram 1 MiB is too small; the smallest that works is --ram 500MiB")
    return FakePlan()


def pack_model(settings: EngineSettings, on_event: OnEvent, output: Path | None) -> PackInfo:
    folder = output or Path("packs/fake")
    errors = () if settings.format == "native" else tuple((layer, 0.08 + layer / 1000) for layer in range(1, 11))
    return PackInfo(
        folder.name, folder, settings.model, settings.revision, settings.format, 2**20, 64, complete=True, errors=errors
    )


if __name__ == "__main__":
    import offload.checkpoint.library as library

    engine = types.ModuleType("offload.engine")
    engine.open_engine, engine.plan_model = open_engine, plan_model  # type: ignore[attr-defined]
    sys.modules["offload.engine"] = engine
    library.pack_model = pack_model
    sys.argv = sys.argv[1:]
    sys.exit(run_local.main())
