"""Opening models and switching between them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from offload.config import EngineSettings, format_size
from offload.errors import UsageError
from offload.events import Planned
from offload.protocol import ModelChoice
from tui.app.load_screen import LoadScreen
from tui.app.prompt_box import PromptBox
from tui.app.screens import Item, ListScreen
from tui.worker import Loading, NotOpened, Opened

if TYPE_CHECKING:
    from tui.app.app import ChatApp


def open_model(app: ChatApp, settings: EngineSettings) -> None:
    """Load a model, seen on a screen of its own; the one before is closed first."""
    app.engine = None
    app.snapshot = app.plan = None
    prompt = PromptBox(app.history, app.look_settings.keys)
    prompt.text = app.prompt.text
    app.prompt.clear()
    screen = LoadScreen(settings.model, app.look, prompt, app.worker.cancel_open, lambda: close_screen(app))
    app.push_screen(screen)
    app.worker.open(settings)


def close_screen(app: ChatApp) -> None:
    """What was typed on it goes to the chat's prompt, and is sent there if it was sent here."""
    screen = app.screen
    if isinstance(screen, LoadScreen):
        typed, place = screen.prompt.text, screen.prompt.cursor_location
        app.pop_screen()
        app.prompt.text = typed
        app.prompt.move_cursor(place)
        if screen.ready and app.engine is not None:
            app.prompt.send()
    app.prompt.focus()


def take(app: ChatApp, news: Loading | Opened | NotOpened) -> None:
    """Progress of a load, or its end."""
    screens = [screen for screen in app.screen_stack if isinstance(screen, LoadScreen)]
    if isinstance(news, Loading):
        if isinstance(news.event, Planned):
            app.plan = news.event
        for screen in screens:
            screen.tell(news.event)
    elif isinstance(news, Opened):
        app.engine, app.settings, app.last_problem = news.engine, news.settings, None
        app.session.set_model(news.engine.model_name)
        app.begun, app.comparison, app.tracing = None, None, False
        app.sidebar.forget()
        close_screen(app)
        app.show_figures()
        app.show_title()
        if app.snapshot is not None:
            app.drawer.show(app.snapshot.current, news.engine.choices)
        if not app.session.conversation.turns:
            app.say(f"chat with {news.engine.model_name}; type a question, F1 shows keys and commands")
    elif news.cancelled:
        app.plan = None
        close_screen(app)
        app.say("loading was cancelled; /models or F6 chooses a model")
        app.show_figures()
        app.show_title()
    else:
        app.plan = None
        app.last_problem = news.problem
        app.say(f"{news.settings.model} could not be loaded: {news.problem}", "bad")
        for screen in screens:
            screen.fail(news.problem)


def show_models(app: ChatApp, models: list[ModelChoice]) -> None:
    """The list to choose from; what is typed and fits none is taken as a name."""
    by_id = {f"m{number}": model for number, model in enumerate(models)}

    def search(words: str) -> list[Item]:
        wanted = words.casefold().split()
        items = []
        for id, model in by_id.items():
            size = format_size(model.bytes) if model.bytes is not None else ""
            detail = " · ".join(part for part in (model.kind, model.format, size, model.remark) if part)
            if all(word in f"{model.name} {detail}".casefold() for word in wanted):
                items.append(Item(id, model.name, detail))
        return items

    def chosen(result: tuple[str, str] | None) -> None:
        if result is None:
            return
        model = by_id.get(result[1])
        if model is None:
            switch(app, result[1], None)
        else:
            switch(app, model.name, model.format or None)

    hint = "Enter loads it · or type a folder or a hub id (org/name) · Esc closes"
    app.push_screen(ListScreen("models on this machine", hint, search, free=True), chosen)


def switch(app: ChatApp, name: str, format: str | None) -> None:
    """Load another model with the other settings as they are. Raises UsageError while an answer is on its way."""
    if app.busy:
        raise UsageError("an answer is on its way; Esc stops it")
    changed = replace(app.settings, model=name, revision=None)
    open_model(app, changed if format is None else replace(changed, format=format))
