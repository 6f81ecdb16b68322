"""What each action of the table does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from textual.app import SuspendNotSupported

from offload.config import SamplingSettings
from offload.errors import UsageError
from tui import actions, tuning
from tui.app import answering, chats, live, loading, reading, tune
from tui.app.editor import edit_text
from tui.app.entries import Answer
from tui.app.look import theme_name
from tui.app.screens import MapScreen, TextScreen
from tui.failures import ExitCode
from tui.save import save_conversation
from tui.settings import THEMES

if TYPE_CHECKING:
    from tui.app.app import ChatApp

Handler = Callable[["ChatApp", str], None]


def _stop(app: ChatApp, argument: str) -> None:
    if app.busy:
        app.stopping = True
        app.worker.stop()
    elif app.drawer.display:
        _drawer(app, "")
    else:
        app.prompt.focus()


def _interrupt(app: ChatApp, argument: str) -> None:
    if selected := app.screen.get_selected_text():
        app.copy(selected, "what was selected")
        app.screen.clear_selection()
    elif app.busy:
        if app.stopping:
            app.leave(ExitCode.INTERRUPTED)
        _stop(app, "")
    elif app.prompt.text:
        app.prompt.clear()
    else:
        app.leave(ExitCode.INTERRUPTED)


def _retry(app: ChatApp, argument: str) -> None:
    last = app.session.conversation.last_question()
    if last is None:
        raise UsageError("there is no question to ask again")
    if app.busy or app.engine is None:
        raise UsageError("an answer is on its way; Esc stops it" if app.busy else "no model is loaded; F6 chooses one")
    question, base = last
    kept = list(app.session.conversation.turns)
    app.session.conversation.turns = list(base)
    answering.rebuild(app)
    app.session.conversation.turns = kept  # until there is a new answer
    answering.ask(app, question, base)


def _edit(app: ChatApp, argument: str) -> None:
    if app.busy:
        raise UsageError("an answer is on its way; Esc stops it")
    question = app.session.cut_last()
    answering.rebuild(app)
    app.prompt.put(question)


def _editor(app: ChatApp, argument: str) -> None:
    try:
        with app.suspend():
            text = edit_text(app.prompt.text)
    except SuspendNotSupported:
        raise UsageError("this terminal cannot be lent to an editor") from None
    app.prompt.put(text)


def _copy(app: ChatApp, argument: str) -> None:
    answers = [entry for entry in app.transcript.entries if isinstance(entry, Answer) and entry.text]
    if argument == "all":
        from tui.save import to_markdown

        app.copy(to_markdown(app.session.conversation, app.session.model), "the chat")
        return
    if not answers:
        raise UsageError("there is no answer to copy yet")
    if argument in ("", "answer"):
        app.copy(answers[-1].text.strip(), "the answer")
    elif argument == "code":
        code = next((code for answer in reversed(answers) if (code := answer.last_code()) is not None), None)
        if code is None:
            raise UsageError("no answer has a block of code")
        app.copy(code, "the code")
    else:
        raise UsageError(f"'{argument}' is not one of answer, code, all")


def _system(app: ChatApp, argument: str) -> None:
    if argument:
        app.session.set_system(None if argument == "-" else argument)
    system = app.session.conversation.system
    if not system:
        app.say("no system prompt")
    else:
        app.say("the system prompt holds from the next question on" if argument else f"system prompt: {system}")


def _set(app: ChatApp, argument: str) -> None:
    names = SamplingSettings.field_names()
    sampling = app.session.sampling
    if argument:
        name, _, text = argument.partition(" ")
        name, text = name.replace("-", "_"), text.strip()
        if name not in names or not text:
            raise UsageError(f"write /set NAME VALUE; the names are {', '.join(names)}")
        app.session.sampling = sampling = sampling.overridden({name: _sampling_value(name, text)})
    shown = [f"{name} {getattr(sampling, name)}" for name in names if getattr(sampling, name) not in (None, ())]
    app.say(f"{' · '.join(shown)}; the rest is as the model's makers say")


def _sampling_value(name: str, text: str) -> object:
    if text == "-":
        return {field.name: field.default for field in fields(SamplingSettings)}[name]
    if name == "stop":
        return text
    try:
        return int(text) if name in ("top_k", "max_new_tokens", "seed") else float(text)
    except ValueError:
        raise UsageError(f"{name}: '{text}' is not a number") from None


def _clear(app: ChatApp, argument: str) -> None:
    if app.busy:
        raise UsageError("an answer is on its way; Esc stops it")
    app.session.clear()
    answering.rebuild(app)
    app.say("conversation cleared" + ("; the system prompt stays" if app.session.conversation.system else ""))


def _save(app: ChatApp, argument: str) -> None:
    if not app.session.conversation.turns:
        raise UsageError("there is nothing to save yet")
    path = Path(argument).expanduser()
    save_conversation(app.session.conversation, app.session.model, path)
    app.say(f"saved to {path}")


def _help(app: ChatApp, argument: str) -> None:
    app.push_screen(TextScreen("keys and commands", actions.help_lines(), app.look))


def _palette(app: ChatApp, argument: str) -> None:
    app.action_command_palette()


def _panel(app: ChatApp, argument: str) -> None:
    app.panel_wanted = not app.sidebar.display
    app.arrange()
    app.call_after_refresh(app.show_figures)


def _map(app: ChatApp, argument: str) -> None:
    app.push_screen(MapScreen(app.look))
    app.call_after_refresh(app.show_figures)


def _think(app: ChatApp, argument: str) -> None:
    thinking = [entry for entry in app.transcript.entries if isinstance(entry, Answer) and entry.thinks]
    unfold = not any(entry.unfolded for entry in thinking)
    for entry in thinking:
        entry.unfolded = unfold
        app.transcript.changed(entry)
    if not thinking:
        app.say("no answer has reasoning")


def _theme(app: ChatApp, argument: str) -> None:
    if not argument:
        app.say(f"the theme is {app.theme}; there are {', '.join(THEMES)}")
        return
    if argument not in THEMES:
        raise UsageError(f"there is no theme '{argument}'; there are {', '.join(THEMES)}")
    app.theme = theme_name(argument)


def _stats(app: ChatApp, argument: str) -> None:
    app.push_screen(TextScreen("statistics of the session", reading.statistics(app), app.look))


def _plan(app: ChatApp, argument: str) -> None:
    app.push_screen(TextScreen("where the memory goes", reading.plan(app), app.look))


def _drawer(app: ChatApp, argument: str) -> None:
    drawer = app.drawer
    drawer.display = not drawer.display
    if drawer.display and app.snapshot is not None and app.engine is not None:
        drawer.show(app.snapshot.current, app.engine.choices)
        inputs = [entry for entry in drawer.query("Input") if entry.parent is None or entry.parent.display]
        if inputs:
            inputs[0].focus()
    else:
        app.prompt.focus()
    app.arrange()
    app.call_after_refresh(app.show_figures)


def _models(app: ChatApp, argument: str) -> None:
    if app.busy:
        raise UsageError("an answer is on its way; Esc stops it")
    app.worker.list_models()


def _suspend(app: ChatApp, argument: str) -> None:
    app.action_suspend_process()


def _quit(app: ChatApp, argument: str) -> None:
    app.leave()


def _changer(name: str) -> Handler:
    return lambda app, argument: live.change(app, name, argument)


HANDLERS: dict[str, Handler] = {
    "stop": _stop,
    "interrupt": _interrupt,
    "retry": _retry,
    "edit": _edit,
    "editor": _editor,
    "copy": _copy,
    "system": _system,
    "set": _set,
    "clear": _clear,
    "save": _save,
    "help": _help,
    "palette": _palette,
    "panel": _panel,
    "map": _map,
    "think": _think,
    "theme": _theme,
    "stats": _stats,
    "up": lambda app, argument: app.transcript.scroll_page_up(animate=False),
    "down": lambda app, argument: app.transcript.scroll_page_down(animate=False),
    "top": lambda app, argument: app.transcript.scroll_home(animate=False),
    "bottom": lambda app, argument: app.transcript.follow(),
    "drawer": _drawer,
    **{field.name: _changer(field.name) for field in tuning.FIELDS},
    "trace": live.trace,
    "tune": tune.tune,
    "plan": _plan,
    "models": _models,
    "model": lambda app, argument: loading.switch(app, argument, None),
    "new": chats.new,
    "conversations": chats.browse,
    "resume": chats.resume,
    "rename": chats.rename,
    "delete": chats.delete,
    "suspend": _suspend,
    "quit": _quit,
}
