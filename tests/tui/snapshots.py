"""Pictures and texts of the screens, with the scripted engine: what a change of the looks changes is seen in review.

``python -m tests.tui.snapshots`` writes them all anew, to ``tests/tui/snapshots/``. A picture is an SVG as Textual
exports it, without what differs from run to run; it is compared where Textual and rich are those that it was made
with, and its text everywhere.
"""

from __future__ import annotations

import asyncio
import html
import os
import re
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

from textual.pilot import Pilot

from tests.tui.app_pilot import ask, enter, host_of, make_app, running, screen_text, until
from tests.tui.fake_engine import Answer
from tui.app.app import ChatApp
from tui.settings import LookSettings

FOLDER = Path(__file__).with_name("snapshots")
SIZES = ((80, 24), (160, 50))
_ANSWER = (
    "A list, then code.",
    "# Three colours\n\nHere they **are**, with `code`:\n\n",
    "1. red\n2. green\n3. blue\n\n",
    "```python\nfor colour in ('red', 'green'):\n    print(colour)  # each\n```\n",
)
Scene = Callable[[ChatApp, "Pilot[int]"], Awaitable[None]]


async def chat(app: ChatApp, pilot: Pilot[int]) -> None:
    """An answer, one that was stopped, a note, an error."""
    await ask(pilot, "Name three colours.")
    await enter(pilot, "And now?")
    await until(pilot, lambda: app.answer is not None and app.answer.text == "It goes on")
    await pilot.press("escape")
    await until(pilot, lambda: not app.busy)
    await enter(pilot, "/system be brief")
    await enter(pilot, "/policy best")
    await until(pilot, lambda: "there are ewma" in screen_text(app))


async def experts(app: ChatApp, pilot: Pilot[int]) -> None:
    await pilot.press("f3", "right", "down")


async def drawer(app: ChatApp, pilot: Pilot[int]) -> None:
    await ask(pilot, "hi")
    await enter(pilot, "/policy lru")
    await until(pilot, lambda: app.comparison is not None)
    await pilot.press("f4")


async def models(app: ChatApp, pilot: Pilot[int]) -> None:
    await pilot.press("f6")
    await until(pilot, lambda: "org/big" in screen_text(app))


async def tune(app: ChatApp, pilot: Pilot[int]) -> None:
    await enter(pilot, "/trace start")
    await until(pilot, lambda: app.tracing)
    await enter(pilot, "/tune")
    await until(pilot, lambda: "Change to lfu" in screen_text(app))


SCENES: dict[str, Scene] = {
    "chat": chat,
    "map": experts,
    "map-ansi": experts,
    "map-letters": experts,
    "drawer": drawer,
    "models": models,
    "tune": tune,
}
PICTURES = ("chat", "map", "map-ansi")
"""The scenes that are kept as pictures, too."""
THEMES = {"map-ansi": "ansi-dark"}
"""Of the scenes that are not dark."""
_COLORLESS = ("map-letters",)


@contextmanager
def terminal_of(scene: str) -> Iterator[None]:
    """The screens do not depend on the terminal that this runs in."""
    with patch.dict(os.environ, {"COLORTERM": "truecolor"}):
        os.environ.pop("NO_COLOR", None)
        if scene in _COLORLESS:
            os.environ["NO_COLOR"] = "1"
        yield


async def take(scene: str, size: tuple[int, int], folder: Path) -> tuple[str, str]:
    """(the picture as SVG, the text) of a scene."""
    host = host_of(Answer(_ANSWER, thoughts=1), Answer(("It goes", " on"), waits=True))
    with terminal_of(scene):
        app = make_app(folder, host, look=LookSettings(THEMES.get(scene, "dark")))
        async with running(app, size) as pilot:
            app.prompt.cursor_blink = False
            await SCENES[scene](app, pilot)
            await pilot.pause(0.2)
            app.show_figures()
            await pilot.pause(0.1)
            return steady(app.export_screenshot(title="run-local")), screen_text(app) + "\n"


def steady(svg: str) -> str:
    """Without the names that Textual gives to a picture."""
    return re.sub(r"terminal-\d+", "terminal", svg)


def text_of(svg: str) -> list[str]:
    """The words of a picture, row by row."""
    rows: dict[float, list[tuple[float, str]]] = {}
    for x, y, text in re.findall(r'<text [^>]*?x="([\d.]+)" y="([\d.]+)"[^>]*>(.*?)</text>', svg):
        rows.setdefault(float(y), []).append((float(x), html.unescape(text).replace("\xa0", " ")))
    return ["".join(text for _, text in sorted(row)).split("\n")[0] for _, row in sorted(rows.items())]


def libraries() -> str:
    """What draws the pictures, for the file that says what they were drawn with."""
    return f"textual {version('textual')}\nrich {version('rich')}\n"


def name(scene: str, size: tuple[int, int]) -> str:
    return f"{scene}-{size[0]}x{size[1]}"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.iterdir():
        old.unlink()
    for scene in SCENES:
        for size in SIZES:
            with tempfile.TemporaryDirectory() as folder:
                svg, text = asyncio.run(take(scene, size, Path(folder)))
            (FOLDER / f"{name(scene, size)}.txt").write_text(text, "utf-8")
            if scene in PICTURES:
                (FOLDER / f"{name(scene, size)}.svg").write_text(svg, "utf-8")
    (FOLDER / "libraries").write_text(libraries(), "utf-8")


if __name__ == "__main__":
    main()
