"""``/tune``: replays beside the chat, with progress; what they found is applied, kept, or left."""

from __future__ import annotations

import threading
import tomllib
from pathlib import Path

import pytest

from offload.errors import RunLocalError
from offload.events import LiveChanges, LoadProgress
from offload.protocol import OnLoad, TuneReport
from tests.tui.app_pilot import ask, does, engine_of, enter, go, host_of, make_app, notes, running, screen_text, until
from tests.tui.fake_engine import Answer
from tests.tui.live_engine import tune_report
from tui.app.tune_screen import TuneScreen


class Sweep:
    """A job that does a step whenever it is released, and ends with ``report`` after four."""

    def __init__(self, report: TuneReport | RunLocalError) -> None:
        self.report = report
        self.release = threading.Semaphore(0)
        self.ended = threading.Event()

    def __call__(self, tell: OnLoad) -> TuneReport:
        try:
            for done in range(5):
                tell(LoadProgress("replaying", done, 4, "steps"))
                assert self.release.acquire(timeout=20)
            if isinstance(self.report, RunLocalError):
                raise self.report
            return self.report
        finally:
            self.ended.set()


@does("/tune")
def test_progress_advice_applied_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    sweep = Sweep(tune_report())

    async def test() -> None:
        app = make_app(tmp_path, host_of(Answer(("a", "b")), job=sweep))
        async with running(app, (100, 30)) as pilot:
            await enter(pilot, "/tune")
            await until(pilot, lambda: app.tracing)
            assert any("it is from now on: ask some questions, then /tune again" in note for note in notes(app))
            await ask(pilot, "hi")
            await enter(pilot, "/tune")
            await until(pilot, lambda: isinstance(app.screen, TuneScreen) and "0 of 4" in screen_text(app))
            sweep.release.release(2)
            await until(pilot, lambda: "2 of 4" in screen_text(app))
            sweep.release.release(3)
            await until(pilot, lambda: "Change to lfu, scope layer" in screen_text(app))
            page = screen_text(app)
            assert "+5.00 ± 2.00 points of hit rate" in page and "a note" in page
            places = [page.index(way) for way in ("advice", "now", "lru")]
            assert places == sorted(places), "the best on top"
            await pilot.press("s", *"mine", "enter")
            await until(pilot, lambda: "kept as preset mine" in screen_text(app))
            await pilot.press("s", *"mine", "enter")
            await until(pilot, lambda: "there is a preset 'mine' already" in screen_text(app))
            await pilot.press("s", *"../no", "enter")
            await until(pilot, lambda: "../no" in screen_text(app) and isinstance(app.screen, TuneScreen))
            await pilot.press("enter")
            await until(pilot, lambda: engine_of(app).current.policy == "lfu")
            assert engine_of(app).changes == [LiveChanges(policy="lfu", scope="layer")]
            await until(pilot, lambda: "policy ewma → lfu, scope - → layer" in notes(app))
            assert len(app.screen_stack) == 1

    go(test())
    kept = (tmp_path / "config" / "run-local" / "presets" / "mine.toml").read_text()
    assert tomllib.loads(kept) == {"policy": "lfu", "scope": "layer", "residency": "0.5"}
    assert not (tmp_path / "config" / "run-local" / "no.toml").exists()


def test_it_is_given_up_and_the_next_one_begins_afresh(tmp_path: Path) -> None:
    sweep = Sweep(tune_report())

    async def test() -> None:
        app = make_app(tmp_path, host_of(job=sweep))
        async with running(app) as pilot:
            await enter(pilot, "/trace start")
            await until(pilot, lambda: app.tracing)
            await enter(pilot, "/tune")
            await until(pilot, lambda: isinstance(app.screen, TuneScreen) and "0 of 4" in screen_text(app))
            await pilot.press("escape")
            sweep.release.release()
            await until(pilot, sweep.ended.is_set)
            assert len(app.screen_stack) == 1
            engine_of(app).job = again = Sweep(RunLocalError("nothing was recorded yet; ask something first"))
            again.release.release(9)
            await enter(pilot, "/tune")
            await until(pilot, lambda: "ask something first" in screen_text(app))
            await pilot.press("enter", "s")
            assert isinstance(app.screen, TuneScreen)  # nothing to apply or to keep
            await pilot.press("escape")
            assert engine_of(app).changes == []

    go(test())


def test_what_runs_is_best_already(tmp_path: Path) -> None:
    async def test() -> None:
        app = make_app(tmp_path, host_of(job=lambda tell: tune_report("ewma", "global")))
        async with running(app) as pilot:
            await enter(pilot, "/trace start")
            await until(pilot, lambda: app.tracing)
            await enter(pilot, "/tune")
            await until(pilot, lambda: "Keep ewma, scope global" in screen_text(app))
            assert "Enter applies" not in screen_text(app) and "now, advice" in screen_text(app)
            await pilot.press("enter")
            assert isinstance(app.screen, TuneScreen)

    go(test())


def test_a_chat_that_ends_takes_its_sweep_along(tmp_path: Path) -> None:
    sweep = Sweep(tune_report())

    async def test() -> None:
        app = make_app(tmp_path, host_of(job=sweep))
        async with running(app) as pilot:
            await enter(pilot, "/trace start")
            await until(pilot, lambda: app.tracing)
            await enter(pilot, "/tune")
            await until(pilot, lambda: isinstance(app.screen, TuneScreen) and "0 of 4" in screen_text(app))
            await pilot.press("ctrl+q")
            sweep.release.release()
            app.tuner.close()
            assert sweep.ended.is_set() and app.return_value == 0

    go(test())
