"""Measures the full-screen chat in a pseudo-terminal.

``python -m tests.tui.measure echo``: milliseconds from a keystroke to its echo while an answer streams, with 200
messages on the screen and an answer of 2,000 lines. ``python -m tests.tui.measure cost``: decoding speed of the demo
model in the full-screen chat against the plain one, in turns. ``python -m tests.tui.measure paint``: what painting
alone costs, painted and not painted windows of one answer in turns, with the processor time of both threads. All print
JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from offload.config import EngineSettings, SamplingSettings
from offload.events import Event, Token
from offload.paths import cache_folder
from offload.protocol import Message
from tests.cli.running import ROOT, environment
from tests.tui import painting
from tests.tui.fake_engine import Answer
from tests.tui.live_engine import FakeHost, FakeLiveEngine
from tests.tui.terminal import Terminal
from tui.app.app import ChatApp
from tui.conversation import Turn
from tui.session import Session

_LINES = ("a line of prose with **some** words in it and more words after them", "", "- a point", "- another", "")
_LISTING = ("```python", *("value = compute(value) + 1  # again" for _ in range(40)), "```", "")
_KEYS = "QXZKJV"  # letters that no answer holds


def long_answer(lines: int) -> list[str]:
    """``lines`` lines of lower case: prose, lists and listings, in pieces of some letters."""
    page = [*_LINES * 12, *_LISTING]
    text = "\n".join((page * (lines // len(page) + 1))[:lines]) + "\n"
    return [text[start : start + 5] for start in range(0, len(text), 5)]


class Streaming(FakeLiveEngine):
    """Gives ``rate`` tokens a second."""

    rate = 100.0

    def generate(self, prompt: str | Sequence[Message], sampling: SamplingSettings) -> Iterator[Event]:
        for event in super().generate(prompt, sampling):
            if isinstance(event, Token):
                time.sleep(1 / self.rate)
            yield event


def child(lines: int, messages: int, rate: float) -> None:
    """The program that is measured."""
    engine = Streaming([Answer(long_answer(lines))], context_tokens=10**9)
    engine.rate = rate
    session = Session(None, SamplingSettings())
    old = "".join(long_answer(40))
    session.conversation.turns = [Turn(f"question {n}", old, "stop") for n in range(messages // 2)]
    app = ChatApp(FakeHost({"demo": engine}), EngineSettings(), session)
    app.run()


def measure_echo(lines: int, messages: int, rate: float, keys: int) -> list[float]:
    """Milliseconds from each of ``keys`` keystrokes to its echo."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.tui.measure", "child", *map(str, (lines, messages, rate))]
        terminal = Terminal(command, ROOT, environment(Path(folder)), (160, 50))
        try:
            terminal.wait("F1 help")
            time.sleep(3)
            terminal.type("go on\r")
            terminal.wait("a line of prose")
            times = []
            for number in range(keys):
                time.sleep(0.11 + 0.013 * (number % 7))
                terminal._read(0)
                before = len(terminal.raw)
                key = _KEYS[number % len(_KEYS)]
                sent = time.perf_counter()
                terminal.type(key)
                while key not in terminal.raw[before:]:
                    terminal._read(0.001)
                    if time.perf_counter() - sent > 5:
                        raise AssertionError("no echo")
                times.append(1000 * (time.perf_counter() - sent))
                if number % 40 == 39:
                    terminal.type("\x03")  # an empty line again
                    break_lines(terminal)
            return times
        finally:
            terminal.close()


def break_lines(terminal: Terminal) -> None:
    """Let what was typed settle."""
    time.sleep(0.05)
    terminal._read(0)


def measure_cost(rounds: int, tokens: int) -> dict[str, list[float]]:
    """Tokens a second of the demo model, by front end."""
    speeds: dict[str, list[float]] = {"plain": [], "full screen": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stats = folder / "stats.json"
        flags = ["chat", "--seed", "1", "--max-new-tokens", str(tokens), "--stats-json", str(stats)]
        kept = environment(folder, RUN_LOCAL_CACHE=str(cache_folder()))
        program = [sys.executable, str(ROOT / "run_local.py"), *flags]
        for _ in range(rounds):
            question = "Tell me a long story."
            subprocess.run([*program, "--plain", question], env=kept, cwd=folder, capture_output=True, check=True)
            speeds["plain"].append(json.loads(stats.read_text())["decode_tokens_per_s"])
            terminal = Terminal(program, folder, kept, (160, 50))
            try:
                terminal.wait("chat with demo")
                terminal.type(question + "\r")
                terminal.wait("tokens/s · first token")
                terminal.type("\x11")
                terminal.leave()
            finally:
                terminal.close()
            speeds["full screen"].append(json.loads(stats.read_text())["decode_tokens_per_s"])
    return speeds


def share(times: list[float], part: float) -> float:
    """The value that ``part`` of the sorted ``times`` do not exceed."""
    return times[min(len(times) - 1, int(part * len(times)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("echo", "cost", "paint", "child"))
    parser.add_argument("numbers", nargs="*", type=float)
    parser.add_argument("--rate", type=float, default=100, help="tokens a second of the streaming answer")
    parser.add_argument("--lines", type=int, default=2000, help="of the answer")
    parser.add_argument("--messages", type=int, default=200, help="on the screen before it")
    parser.add_argument("--keys", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--format", default="native", help="of the demo model, for paint")
    parser.add_argument("--size", default="160x50", help="of the terminal, for paint")
    given = parser.parse_args()
    found: dict[str, object]
    if given.what == "child":
        child(int(given.numbers[0]), int(given.numbers[1]), given.numbers[2])
        return
    if given.what == "echo":
        times = sorted(measure_echo(given.lines, given.messages, given.rate, given.keys))
        found = {
            "lines": given.lines, "messages": given.messages, "tokens_per_s": given.rate, "keystrokes": len(times),
            "median_ms": statistics.median(times), "p95_ms": share(times, 0.95), "most_ms": times[-1],
        }  # fmt: skip
    elif given.what == "paint":
        width, height = (int(part) for part in given.size.split("x"))
        found = painting.measure(given.rounds, given.tokens, given.format, (width, height))
    else:
        speeds = measure_cost(given.rounds, given.tokens)
        plain, full = (statistics.median(speeds[name]) for name in ("plain", "full screen"))
        found = {"tokens_per_s": speeds, "median": {"plain": plain, "full screen": full}, "cost": 1 - full / plain}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
