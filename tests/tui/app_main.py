"""The full-screen chat with a scripted engine whose answer never ends by itself. To be run in a terminal of its own.

With ``crash`` the engine's state cannot be asked for any more once it has begun to answer: a bug of the program.
"""

from __future__ import annotations

import sys
import threading

from offload.config import EngineSettings, SamplingSettings
from offload.events import CacheSnapshot
from tests.tui.fake_engine import Answer
from tests.tui.live_engine import FakeHost, FakeLiveEngine
from tui.app.run import ChatRequest, run_app
from tui.failures import run_guarded


class Crashing(FakeLiveEngine):
    def snapshot(self) -> CacheSnapshot:
        if self.prompts:
            raise ValueError("what no one has thought of")
        return super().snapshot()


def main() -> int:
    kind = Crashing if "crash" in sys.argv else FakeLiveEngine
    engine = kind([Answer(("red ", "green ", "blue"))], gate=threading.Semaphore(2))
    host = FakeHost({"demo": engine})
    return run_guarded(lambda: run_app(host, ChatRequest(EngineSettings(model="demo"), SamplingSettings())))


if __name__ == "__main__":
    sys.exit(main())
