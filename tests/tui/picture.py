"""Pictures of the full-screen chat, from the real program with the demo model.

``python -m tests.tui.picture docs/screen.svg`` makes the one of the README: questions are asked, the answer is still
on its way. ``--size 80x24``, ``--theme light``, ``--open map`` (or drawer, help, chats) give others.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path

from offload.config import EngineSettings, SamplingSettings
from offload.host import LocalHost
from tests.tui.snapshots import terminal_of
from tui.app.app import ChatApp
from tui.app.entries import Answer
from tui.libraries import prepare_libraries
from tui.session import Session
from tui.settings import LookSettings
from tui.store import Store

QUESTIONS = ("Write a short python function that adds two numbers.", "What is a cache? Give three short points.")
_KEYS = {"map": "f3", "drawer": "f4", "help": "f1", "chats": "f5", "palette": "ctrl+p", "models": "f6"}


async def wait(pilot: object, ready: Callable[[], bool], seconds: float = 300) -> None:
    for _ in range(int(seconds / 0.05)):
        if ready():
            return
        await pilot.pause(0.05)  # type: ignore[attr-defined]
    raise TimeoutError("the program does not get where the picture is taken")


async def picture(file: Path, size: tuple[int, int], theme: str, opened: str | None, residency: float) -> None:
    prepare_libraries(offline=False)
    with tempfile.TemporaryDirectory() as folder:
        session = Session(Store(Path(folder)), SamplingSettings(temperature=0, max_new_tokens=160))
        settings = EngineSettings(residency=residency)
        app = ChatApp(LocalHost(), settings, session, LookSettings(theme))
        async with app.run_test(size=size) as pilot:
            await wait(pilot, lambda: app.engine is not None)
            for number, question in enumerate(QUESTIONS):
                app.prompt.put(question)
                await pilot.press("enter")
                last = number == len(QUESTIONS) - 1
                await wait(pilot, lambda: app.busy)
                answer = app.answer
                assert isinstance(answer, Answer)
                await wait(pilot, lambda last=last, answer=answer: not app.busy or (last and len(answer.text) > 350))
            if opened:
                await pilot.press(_KEYS[opened])
                await pilot.pause(0.5)
            app.show_figures()
            await pilot.pause(0.2)
            file.write_text(app.export_screenshot(title="run-local"), "utf-8")
        app.worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--size", default="150x44")
    parser.add_argument("--theme", default="dark")
    parser.add_argument("--open", choices=sorted(_KEYS))
    parser.add_argument("--residency", type=float, default=0.5)
    given = parser.parse_args()
    width, height = (int(part) for part in given.size.split("x"))
    with terminal_of("chat"):
        asyncio.run(picture(given.file, (width, height), given.theme, given.open, given.residency))


if __name__ == "__main__":
    main()
