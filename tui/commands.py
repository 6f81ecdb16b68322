"""The chat's commands: one table for running them and for ``/help``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from offload.errors import RunLocalError, UsageError
from tui.actions import BY_NAME
from tui.save import save_conversation

if TYPE_CHECKING:
    from tui.plain import PlainChat


@dataclass(frozen=True, slots=True)
class Command:
    """``argument`` is how the help names it; empty if the command takes none."""

    name: str
    argument: str
    help: str
    run: Callable[[PlainChat, str], None]


def run_command(chat: PlainChat, line: str) -> None:
    """Run ``line``, which starts with a slash. What goes wrong is said in a line, and the chat goes on."""
    name, *rest = line.split(maxsplit=1)
    argument = rest[0].strip() if rest else ""
    command = next((command for command in COMMANDS if command.name == name), None)
    try:
        if command is None:
            names = " ".join(command.name for command in COMMANDS)
            raise UsageError(f"there is no command {name}; there are {names} (//text sends a text that starts with /)")
        if argument and not command.argument:
            raise UsageError(f"{name} takes nothing after it")
        command.run(chat, argument)
    except RunLocalError as error:
        chat.screen.problem(str(error))


def help_text() -> str:
    """The commands and the keys."""
    rows = [(f"{command.name} {command.argument}".rstrip(), command.help) for command in COMMANDS] + list(KEYS)
    width = max(len(left) for left, _ in rows)
    return "\n".join(f"  {left:<{width}}  {right}" for left, right in rows)


def _help(chat: PlainChat, argument: str) -> None:
    chat.screen.note(help_text())


def _system(chat: PlainChat, argument: str) -> None:
    conversation = chat.conversation
    if argument:
        chat.session.set_system(None if argument == "-" else argument)
    if not conversation.system:
        chat.screen.note("no system prompt")
    elif argument:
        chat.screen.note("the system prompt holds from the next question on")
    else:
        chat.screen.note(f"system prompt: {conversation.system}")


def _clear(chat: PlainChat, argument: str) -> None:
    chat.session.clear()
    chat.screen.note("conversation cleared" + ("; the system prompt stays" if chat.conversation.system else ""))


def _retry(chat: PlainChat, argument: str) -> None:
    last = chat.conversation.last_question()
    if last is None:
        raise UsageError("there is no question to ask again")
    chat.ask(*last)


def _save(chat: PlainChat, argument: str) -> None:
    if not argument:
        raise UsageError("/save needs a file name that ends in .md or .json")
    if not chat.conversation.turns:
        raise UsageError("there is nothing to save yet")
    try:
        path = Path(argument).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{argument}: {error}") from None
    save_conversation(chat.conversation, chat.engine.model_name, path)
    chat.screen.note(f"saved to {path}")


def _quit(chat: PlainChat, argument: str) -> None:
    chat.leaving = True


def _command(name: str, run: Callable[[PlainChat, str], None]) -> Command:
    """The plain console's part of :data:`tui.actions.ACTIONS`: the same names, the same words."""
    action = BY_NAME[name]
    return Command(f"/{action.slash}", action.argument, action.help, run)


COMMANDS = (
    _command("help", _help),
    _command("system", _system),
    _command("clear", _clear),
    _command("retry", _retry),
    _command("save", _save),
    _command("quit", _quit),
)
KEYS = (
    ("//text", "send a text that starts with a slash"),
    ("line\\", "a backslash at the end of a line: the message goes on with the next line"),
    ('"""', "starts and ends a message of several lines"),
    ("Ctrl-C", "stop the answer and keep it; a second one leaves (exit code 130)"),
    ("", "at the prompt: drop what is typed; on an empty line leave (exit code 130)"),
    ("Ctrl-D", "leave (exit code 0)"),
)
