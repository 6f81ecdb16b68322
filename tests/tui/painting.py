"""What painting costs the decoding: one answer in the real full-screen chat, painted and not painted in turns.

Two runs of the program differ by more than the screen costs, since the machine drifts. Here windows of some tokens
alternate within a run: in one the screen is painted, in the next the app's tick does nothing. Neighbours are compared.
``python -m tests.tui.measure paint`` prints the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from offload.config import EngineSettings, SamplingSettings
from offload.events import Token
from offload.host import LocalHost
from offload.paths import cache_folder
from offload.protocol import EngineHost
from tests.cli.running import ROOT, environment
from tests.tui.terminal import Terminal
from tui.app.app import ChatApp
from tui.libraries import prepare_libraries
from tui.session import Session
from tui.tuner import TuneNews
from tui.worker import Answering, News

WINDOW = 12
"""Tokens that are painted, or not painted, in a row. The first of each is left out: it may pay for the one before."""
QUESTION = "Tell me a long story."


@dataclass(frozen=True, slots=True)
class Mark:
    """A token's arrival: seconds of the clock, and processor time of the engine's thread and of the screen's."""

    clock: float
    engine: float
    screen: float


class Alternating(ChatApp):
    """Paints :data:`WINDOW` tokens, skips as many, and so on; ``marks`` has one for each token."""

    def __init__(self, host: EngineHost, settings: EngineSettings, session: Session) -> None:
        self.marks: list[Mark] = []
        super().__init__(host, settings, session)
        self._screen_clock = time.pthread_getcpuclockid(threading.get_ident())

    def _deliver(self, news: News | TuneNews) -> None:
        if isinstance(news, Answering) and isinstance(news.event, Token):
            screen = time.clock_gettime(self._screen_clock)
            self.marks.append(Mark(time.perf_counter(), time.thread_time(), screen))
        super()._deliver(news)

    def _tick(self) -> None:
        if self.busy and len(self.marks) // WINDOW % 2:
            self.set_timer(0.1, self._tick)
        else:
            super()._tick()


def child(file: Path, tokens: int, format: str) -> None:
    """The program that is measured; writes its marks to ``file`` when it is left."""
    prepare_libraries(offline=True)
    session = Session(None, SamplingSettings(seed=1, max_new_tokens=tokens))
    app = Alternating(LocalHost(), EngineSettings(format=format), session)
    app.run()
    app.worker.close()
    file.write_text(json.dumps([[m.clock, m.engine, m.screen] for m in app.marks]))


def windows(marks: Sequence[Mark]) -> list[Mark]:
    """What a token took on average, of each whole window: painted, not painted, painted, ..."""
    found = []
    for start in range(0, len(marks) - WINDOW, WINDOW):
        first, last, count = marks[start + 1], marks[start + WINDOW], WINDOW - 1
        found.append(
            Mark(
                (last.clock - first.clock) / count,
                (last.engine - first.engine) / count,
                (last.screen - first.screen) / count,
            )
        )
    return found


def compare(runs: Sequence[Sequence[Mark]]) -> dict[str, object]:
    """The cost as a share of decoding time: mean and standard error over all pairs of neighbours, and median."""
    painted, plain, costs = [], [], []
    for marks in runs:
        some = windows(marks)
        for number, (one, other) in enumerate(pairwise(some)):
            with_screen, without = (other, one) if number % 2 else (one, other)
            costs.append(math.log(with_screen.clock / without.clock))
        painted += some[::2]
        plain += some[1::2]

    def middle(value: Callable[[Mark], float]) -> dict[str, float]:
        sides = {"painted": painted, "not painted": plain}
        return {name: round(1000 * statistics.median(map(value, side)), 3) for name, side in sides.items()}

    return {
        "pairs": len(costs),
        "cost": statistics.mean(costs),
        "standard_error": statistics.stdev(costs) / math.sqrt(len(costs) / 2),  # neighbours share a window
        "median_cost": statistics.median(costs),
        "ms_per_token": middle(lambda mark: mark.clock),
        "engine_cpu_ms_per_token": middle(lambda mark: mark.engine),
        "screen_cpu_ms_per_token": middle(lambda mark: mark.screen),
        "screen_share_of_a_core": statistics.median(mark.screen / mark.clock for mark in painted),
    }


def measure(rounds: int, tokens: int, format: str, size: tuple[int, int]) -> dict[str, object]:
    """Run the chat ``rounds`` times in a pseudo-terminal of ``size``."""
    runs, written = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = environment(folder, RUN_LOCAL_CACHE=str(cache_folder()))
        for _ in range(rounds):
            marks = folder / "marks.json"
            command = [sys.executable, "-m", "tests.tui.painting", str(marks), str(tokens), format]
            terminal = Terminal(command, ROOT, kept, size)
            try:
                terminal.wait("chat with demo")
                time.sleep(1)
                before = len(terminal.raw)
                terminal.type(QUESTION + "\r")
                terminal.wait("tokens/s · first token", 600)
                written.append(len(terminal.raw) - before)
                terminal.type("\x11")
                terminal.leave()
            finally:
                terminal.close()
            runs.append([Mark(*values) for values in json.loads(marks.read_text())])
    count = sum(map(len, runs)) / 2
    return {"terminal": f"{size[0]}x{size[1]}", "format": format, **compare(runs),
            "bytes_written_per_painted_token": round(sum(written) / count)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("tokens", type=int)
    parser.add_argument("format")
    given = parser.parse_args()
    child(given.file, given.tokens, given.format)


if __name__ == "__main__":
    main()
