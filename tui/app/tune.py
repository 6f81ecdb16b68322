"""``/tune``: from the recorded routing of the talk to a better policy, applied at once or kept as a preset."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from offload.errors import UsageError
from offload.events import LiveChanges
from offload.protocol import TuneJob, TuneReport
from tui import tuning
from tui.app import live
from tui.app.tune_screen import TuneScreen
from tui.config_file import preset_path, save_preset
from tui.tuner import TuneNews, TuneProgress

if TYPE_CHECKING:
    from tui.app.app import ChatApp


def tune(app: ChatApp, argument: str) -> None:
    """Begin. Without a recording one is begun instead, for the next time. Raises UsageError without a model."""
    if app.engine is None:
        raise UsageError("no model is loaded; /models or F6 chooses one")
    if app.tracing or app.settings.trace_out is not None:
        app.worker.call("tune", lambda engine: engine.tune_job())
    else:
        app.worker.call("trace start", lambda engine: engine.start_trace())
        app.say("nothing was recorded so far; it is from now on: ask some questions, then /tune again")


def begin(app: ChatApp, job: TuneJob) -> None:
    """The engine has handed its recording over."""
    app.push_screen(
        TuneScreen(
            job,
            app.look,
            app.tuner.cancel,
            lambda changes: _apply(app, changes),
            lambda report, name: _keep(app, report, name),
        )
    )
    app.tuner.start(job)


def take(app: ChatApp, news: TuneNews) -> None:
    """Progress of a sweep, or its end; nobody may be looking any more."""
    for screen in app.screen_stack:
        if not isinstance(screen, TuneScreen) or screen.job is not news.job:
            continue
        if isinstance(news, TuneProgress):
            screen.tell(news.event, time.monotonic())
        elif news.report is not None:
            screen.show(news.report)
        else:
            screen.fail(news.problem or "")


def _apply(app: ChatApp, changes: LiveChanges) -> None:
    if app.snapshot is not None:
        live.apply(app, changes, tuning.describe_all(app.snapshot.current, changes))


def _keep(app: ChatApp, report: TuneReport, name: str) -> str:
    path = preset_path(name, "the name")
    if path.exists():
        raise UsageError(f"there is a preset '{name}' already; choose another name")
    model = report.found["model"]
    save_preset(path, report.flags, [f"/tune in a chat with {model}, {report.found['requests']} questions"])
    told = f"kept as preset {name}: run-local chat --preset {name}"
    app.say(f"{told} ({path})")
    return told
