"""The real program with the demo model in a pseudo-terminal: what its screen says is what it measured."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from offload.paths import cache_folder
from tests.cli.running import ROOT, environment
from tests.tui.terminal import Terminal, restored

pytestmark = pytest.mark.demo


@contextmanager
def chat(folder: Path, *flags: str, size: tuple[int, int] = (130, 45), cache: Path | None = None) -> Iterator[Terminal]:
    command = [sys.executable, str(ROOT / "run_local.py"), "chat", "--temperature", "0", "--ctx", "512", *flags]
    changes = {f"XDG_{kind}_HOME": str(folder / kind.lower()) for kind in ("DATA", "STATE", "CONFIG")}
    kept = environment(folder, RUN_LOCAL_CACHE=str(cache or cache_folder()), OMP_NUM_THREADS="1", **changes)
    terminal = Terminal(command, folder, kept, size)
    try:
        yield terminal
    finally:
        terminal.close()


def figures_agree(page: str, stats: dict[str, Any]) -> None:
    """What the panel says is what ``--stats-json`` says of the same run, to the last digit shown."""
    experts, slots = stats["experts"], stats["memory"]["expert_slots"]
    assert f"{stats['decode_tokens_per_s']:.1f} mean" in page, page
    assert f"{100 * experts['hit_rate']:.1f} % conversation" in page, page
    assert f"{slots} of {slots} hold experts" in page, page


def test_an_answer_a_change_and_the_figures(demo_model_dir: Path, tmp_path: Path) -> None:
    """The short version of the one below."""
    stats_file = tmp_path / "stats.json"
    with chat(tmp_path, "--stats-json", str(stats_file), "--max-new-tokens", "12") as terminal:
        terminal.wait("chat with demo")
        terminal.type("Name three colours.\r")
        terminal.wait("tokens/s · first token")
        terminal.type("/policy lru\r")
        terminal.wait("→ lru")
        page = terminal.settled()
        terminal.type("\x11")
        assert terminal.leave() == 0
        assert restored(terminal)
    stats = json.loads(stats_file.read_text())
    assert stats["policy"] == "lru"
    figures_agree(page, stats)
    saved = next((tmp_path / "data" / "run-local" / "conversations").glob("*.jsonl"))
    assert "Name three colours." in saved.read_text()


def test_an_expert_file_that_is_cut_while_chatting(demo_model_dir: Path, tmp_path: Path) -> None:
    """The answer that cannot be read says what to do; what was said before is there after a restart."""
    packs = cache_folder() / "packs"
    if not list(packs.glob("demo-*-native/manifest.json")):
        with chat(tmp_path, "--max-new-tokens", "1", "How are you?") as terminal:  # makes it
            terminal.leave(120)
    (pack,) = packs.glob("demo-*-native")
    cache = tmp_path / "own"
    shutil.copytree(pack, cache / "packs" / pack.name)
    (cache / "demo").symlink_to(cache_folder() / "demo")
    flags = ("--residency", "0.1", "--max-new-tokens", "3")
    with chat(tmp_path, *flags, cache=cache) as terminal:
        terminal.wait("chat with demo")
        terminal.type("Name three colours.\r")
        terminal.wait("tokens/s · first token")
        os.truncate(max((cache / "packs" / pack.name).iterdir(), key=lambda path: path.stat().st_size), 4096)
        terminal.type("And something else, please?\r")
        terminal.wait("the conversation is as it was before")
        page = " ".join(terminal.text().split())
        assert "the file ends inside the record of layer" in page and "--remove demo-" in page, page
        terminal.type("\x11")
        assert terminal.leave() == 0
        assert restored(terminal)
    assert not list((tmp_path / "state").rglob("reports/*"))
    with chat(tmp_path, *flags, "--continue") as terminal:  # with the whole pack
        page = terminal.wait("ask something")
        assert "Name three colours." in page and "something else" not in page


@pytest.mark.slow
def test_start_ask_stop_change_resume_quit(demo_model_dir: Path, tmp_path: Path) -> None:
    stats_file = tmp_path / "stats.json"
    with chat(tmp_path, "--stats-json", str(stats_file), "--max-new-tokens", "60") as terminal:
        terminal.wait("chat with demo")
        terminal.type("Name three colours.\r")
        terminal.wait(lambda text: "tokens/s · first token" in text)
        terminal.type("Tell me a long story.\r")
        terminal.wait(lambda text: re.search(r"a long story\.[^\n]*\n[^\n]*\n [A-Z][\w ,]{20}", text) is not None)
        terminal.type("\x1b")
        terminal.wait("stopped · ")
        terminal.type("/policy lru\r")
        terminal.wait("→ lru")
        terminal.type("/tune\r")
        terminal.wait("it is from now on")
        terminal.type("And now?\r")
        terminal.wait(lambda text: "tokens/s · first token" in text.partition("› And now?")[2])
        page = terminal.settled()
        terminal.type("/tune\r")
        terminal.wait(lambda text: "Change to" in text or "Keep lru" in text)
        terminal.type("\x1b")
        terminal.wait("And now?")
        terminal.type("\x11")
        assert terminal.leave() == 0
        assert restored(terminal)
    stats = json.loads(stats_file.read_text())
    assert stats["policy"] == "lru"
    figures_agree(page, stats)
    saved = next((tmp_path / "data" / "run-local" / "conversations").glob("*.jsonl"))
    assert "Name three colours." in saved.read_text()

    with chat(tmp_path, "--continue", size=(80, 24)) as terminal:
        terminal.wait("And now?")
        terminal.wait(lambda text: "prefetch off" in text and "Steps" not in text)
        terminal.type("\x04")
        assert terminal.leave() == 0
        assert restored(terminal)


@pytest.mark.slow
def test_a_kill_leaves_the_conversation_and_a_usable_terminal(demo_model_dir: Path, tmp_path: Path) -> None:
    with chat(tmp_path, size=(80, 24)) as terminal:
        terminal.wait(lambda text: "prefetch off" in text and "Steps" not in text)
        terminal.type("Tell me a long story.\r")
        terminal.wait("› Tell me a long story.")
        os.kill(terminal.process.pid, signal.SIGTERM)
        assert terminal.leave() == 143
        assert restored(terminal)
    saved = next((tmp_path / "data" / "run-local" / "conversations").glob("*.jsonl"))
    assert "Tell me a long story." in saved.read_text()


def test_a_model_that_cannot_be_loaded_is_said_on_the_screen_and_at_the_end(tmp_path: Path) -> None:
    with chat(tmp_path, "--model", str(tmp_path / "nowhere"), size=(80, 24)) as terminal:
        terminal.wait("Esc goes back")
        terminal.type("\x11")
        assert terminal.leave() == 1
        assert restored(terminal)
        assert "run-local: error: --model: the folder" in terminal.raw
