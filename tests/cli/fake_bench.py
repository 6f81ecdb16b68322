"""The real ``bench`` with a scripted engine: ``python -m tests.cli.fake_bench SCRIPT ...``. Its children are the same.

Each process that opens an engine appends its policy to the file that ``FAKE_BENCH_LOG`` names.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import run_local
from offload.config import EngineSettings
from offload.errors import ModelError, UsageError
from offload.events import LoadProgress, Notice
from tests.bench.fake_engine import FakeBenchEngine

RATES = {"lru": (10.0, 30.0), "lfu": (20.0,)}
OnEvent = Callable[[LoadProgress | Notice], None]


class Calibration:
    def rows(self) -> list[tuple[str, str, str]]:
        return [("disk", "1.8 GB/s", "random reads"), ("memory", "21.0 GB/s", "")]

    def to_json(self) -> dict[str, object]:
        return {"disk_bytes_per_s": 1.8e9}


def calibrate(folder: Path, on_progress: OnEvent) -> Calibration:
    on_progress(LoadProgress("measure", 2, 2, "steps"))
    on_progress(Notice(f"probing {folder}"))
    return Calibration()


def open_engine(settings: EngineSettings, on_event: OnEvent) -> FakeBenchEngine:
    on_event(Notice(f"notice: {settings}"))
    if log := os.environ.get("FAKE_BENCH_LOG"):
        with open(log, "a") as file:
            file.write(settings.policy + "\n")
    if settings.policy == "bad":
        raise UsageError("--policy: there is no policy 'bad'")
    if settings.model == "none":
        raise ModelError("none: there is no such model")
    return FakeBenchEngine(
        context_tokens=settings.context_tokens or 80,
        rates=RATES.get(settings.policy, (5.0,)),
        waits=sys.argv[0] == "waits",
    )


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    engine = types.ModuleType("offload.engine")
    engine.open_engine = open_engine  # type: ignore[attr-defined]
    calibration = types.ModuleType("offload.compute.calibration")
    calibration.calibrate = calibrate  # type: ignore[attr-defined]
    calibration.save = lambda result: Path("calibration.json")  # type: ignore[attr-defined]
    calibration.load = lambda: None  # type: ignore[attr-defined]
    sys.modules |= {"offload.engine": engine, "offload.compute.calibration": calibration}
    run_local._own_command = lambda: [sys.executable, "-m", "tests.cli.fake_bench", sys.argv[0]]
    code = run_local.main()
    if sys.argv[0] == "imports":
        print([name for name in ("torch", "transformers", "numpy") if name in sys.modules], file=sys.stderr)
    sys.exit(code)
