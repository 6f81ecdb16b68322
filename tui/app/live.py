"""Changes while chatting, recordings, and what else is asked of the engine from the screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from offload.errors import UsageError
from offload.events import CacheSnapshot, LiveChanges
from offload.protocol import LiveEngine
from tui import tuning
from tui.app import loading
from tui.figures import Comparison
from tui.worker import Called

if TYPE_CHECKING:
    from tui.app.app import ChatApp


def change(app: ChatApp, name: str, text: str) -> None:
    """Show the setting ``name``, or change it to ``text``. Raises UsageError if it cannot be."""
    engine, snapshot = app.engine, app.snapshot
    if engine is None or snapshot is None:
        raise UsageError("no model is loaded; /models or F6 chooses one")
    names = engine.choices.get(name, ())
    if not text:
        value = getattr(snapshot.current, name)
        shown = "-" if value is None else tuning.BY_NAME[name].show(value)
        app.say(f"{name} {shown}" + (f"; there are {', '.join(names)}" if names else ""))
        return
    apply(app, tuning.changes(name, text), tuning.describe(name, snapshot.current, text))


def apply(app: ChatApp, wanted: LiveChanges, label: str) -> None:
    """Change the engine between tokens; ``label`` says what changes."""

    def call(live: LiveEngine) -> tuple[str, CacheSnapshot]:
        before = live.snapshot()
        live.change(wanted)
        return label, before

    app.worker.call("change", call)


def trace(app: ChatApp, argument: str) -> None:
    """``start``, or ``stop FILE``. Raises UsageError for anything else."""
    verb, _, name = argument.partition(" ")
    if verb == "start" and not name:
        app.worker.call("trace start", lambda live: live.start_trace())
    elif verb == "stop" and name.strip():
        path = Path(name.strip()).expanduser()
        if path.exists():
            raise UsageError(f"{path}: exists already; choose another name")
        app.worker.call("trace stop", lambda live: (live.stop_trace(path), path))
    else:
        raise UsageError("write /trace start, or /trace stop FILE.npz")


def take(app: ChatApp, news: Called) -> None:
    """A call is through."""
    if news.problem is not None:
        app.say(news.problem, "bad")
        if app.snapshot is not None and app.engine is not None:
            app.drawer.show(app.snapshot.current, app.engine.choices)
        return
    if news.name == "models":
        loading.show_models(app, news.result)
    elif news.name == "change":
        label, before = news.result
        app.comparison = Comparison(label, before)
        app.show_figures()
        app.show_title()
        if app.snapshot is not None and app.engine is not None:
            app.drawer.show(app.snapshot.current, app.engine.choices)
        app.say(label)
    elif news.name == "trace start":
        app.tracing = True
        app.show_title()
        app.say("recording the routing; /trace stop FILE.npz writes it")
    elif news.name == "trace stop":
        app.tracing = False
        app.show_title()
        rows, path = news.result
        app.say(f"{rows} rows of routing in {path}")
