"""Conversations on the screen: new ones, old ones, their titles."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from offload.errors import RunLocalError, UsageError
from tui.app import answering
from tui.app.screens import Item, LineScreen, ListScreen
from tui.store import Saved, Store, read_saved

if TYPE_CHECKING:
    from tui.app.app import ChatApp


def new(app: ChatApp, argument: str = "") -> None:
    """Begin another conversation."""
    _check_idle(app)
    app.session.new()
    _show(app)
    app.say("a new conversation" + ("; the system prompt stays" if app.session.conversation.system else ""))


def resume(app: ChatApp, id: str) -> None:
    """Go on with a saved one. Raises RunLocalError if it cannot be."""
    _check_idle(app)
    saved = app.session.resume(_store(app).find(id))
    _show(app)
    if saved.model and saved.model != app.session.model:
        app.say(f"this conversation was held with {saved.model}; it goes on with {app.session.model}")


def rename(app: ChatApp, title: str) -> None:
    app.session.set_title(title)
    app.show_title()


def delete(app: ChatApp, id: str) -> None:
    """Delete a saved conversation, but not the one on the screen. Raises RunLocalError if it cannot be."""
    path = _store(app).find(id)
    if app.session.id == path.stem:
        raise UsageError("this is the conversation that you are in; /new begins another")
    app.say(f"deleted: {_store(app).delete(path.stem).name}")


def browse(app: ChatApp, words: str = "") -> None:
    """The list of all conversations, those that hold ``words`` first of all."""
    store = _store(app)

    def search(typed: str) -> list[Item]:
        return [_item(saved, app.session.id) for saved in store.list(typed)]

    def chosen(result: tuple[str, str] | None) -> None:
        if result is None:
            return
        what, id = result
        try:
            if what == "choose" and id != app.session.id:
                resume(app, id)
            elif what == "delete":
                delete(app, id)
                browse(app, words)
            elif what == "rename":
                _ask_title(app, store, id)
        except RunLocalError as error:
            app.say(str(error), "bad")

    hint = "Enter goes on with it · F2 gives it a title · Delete twice deletes it · Esc closes"
    app.push_screen(ListScreen("conversations", hint, search, extra=("delete", "rename"), words=words), chosen)


def _ask_title(app: ChatApp, store: Store, id: str) -> None:
    def entered(title: str | None) -> None:
        if title is None:
            return
        try:
            if id == app.session.id:
                rename(app, title)
            else:
                store.rename(id, title)
        except RunLocalError as error:
            app.say(str(error), "bad")
        browse(app)

    app.push_screen(LineScreen("title", read_saved(store.find(id)).name), entered)


def _item(saved: Saved, here: str | None) -> Item:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(saved.changed))
    count = len(saved.conversation.turns)
    mark = "● " if saved.id == here else ""
    detail = f"{when} · {saved.model} · {count} question{'' if count == 1 else 's'} · {saved.id}"
    return Item(saved.id, mark + (saved.name or saved.id), detail)


def _show(app: ChatApp) -> None:
    """A conversation has begun here: it is shown, and its hit rate counts from now on."""
    answering.rebuild(app)
    app.begun = app.engine.stats() if app.engine is not None else None
    app.show_title()
    app.show_figures()
    app.prompt.focus()


def _store(app: ChatApp) -> Store:
    if app.session.store is None:
        raise UsageError("there is no folder for conversations: this user has no home")
    return app.session.store


def _check_idle(app: ChatApp) -> None:
    if app.busy:
        raise UsageError("an answer is on its way; Esc stops it")
