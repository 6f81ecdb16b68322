"""The one table of what a user can do: bindings, footer, palette, slash commands, help and manual come from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from offload.errors import UsageError


@dataclass(frozen=True, slots=True)
class Action:
    """``keys`` in Textual's names. ``slash`` is the command's name without its slash, empty if it has none;
    ``argument`` is how the help names what follows it, in brackets if it may be left out, empty if there is none.
    ``footer`` is its label at the bottom of the screen; empty: not there. ``scope`` "prompt": the keys count only
    while a message is typed.
    """

    name: str
    group: str
    help: str
    keys: tuple[str, ...] = ()
    slash: str = ""
    argument: str = ""
    footer: str = ""
    scope: str = "app"

    @property
    def usage(self) -> str:
        """``/save FILE``, or nothing."""
        return f"/{self.slash} {self.argument}".rstrip() if self.slash else ""

    @property
    def needs_argument(self) -> bool:
        return bool(self.argument) and not self.argument.startswith("[")


CHAT, LOOK, TUNE, MODEL, SAVED = "Chat", "Look", "Tune", "Model", "Conversations"

ACTIONS = (
    Action("send", CHAT, "send the message", ("enter",), scope="prompt"),
    Action("newline", CHAT, "begin a new line in the message", ("shift+enter", "ctrl+j"), scope="prompt"),
    Action("stop", CHAT, "stop the answer and keep what there is of it", ("escape",), "stop", footer="stop"),
    Action(
        "interrupt",
        CHAT,
        "copy what is selected; else stop the answer, a second time leave; at the prompt drop what is typed, "
        "on an empty line leave (exit code 130)",
        ("ctrl+c",),
    ),
    Action(
        "retry",
        CHAT,
        "ask the last question again; a new answer replaces the old one",
        ("ctrl+r",),
        "retry",
    ),
    Action("edit", CHAT, "take the last question back into the prompt, to send it changed", ("alt+up",), "edit"),
    Action("editor", CHAT, "write the message in $VISUAL or $EDITOR", ("ctrl+g",), "editor"),
    Action("older", CHAT, "the message sent before, while the cursor is in the first line", ("up",), scope="prompt"),
    Action("newer", CHAT, "the message sent after, while the cursor is in the last line", ("down",), scope="prompt"),
    Action("copy", CHAT, "copy the last answer, its last block of code, or the whole chat", ("ctrl+y",), "copy",
           "[answer|code|all]"),
    Action("system", CHAT, "show the system prompt or set it; - removes it", (), "system", "[TEXT]"),
    Action("set", CHAT, "show the sampling settings or set one; - as value: the model's own", (), "set",
           "[NAME VALUE]"),
    Action("clear", CHAT, "forget the conversation, keep the system prompt", (), "clear"),
    Action("save", CHAT, "write the conversation to FILE.md or FILE.json, never over an old file", (), "save", "FILE"),
    Action("help", LOOK, "show the keys and commands", ("f1",), "help", footer="help"),
    Action("palette", LOOK, "find an action by its name", ("ctrl+p",), footer="actions"),
    Action("panel", LOOK, "show or hide the live figures", ("f2",), "panel", footer="panel"),
    Action("map", LOOK, "show or hide the map of all experts", ("f3",), "map", footer="map"),
    Action("think", LOOK, "fold or unfold all reasoning", ("ctrl+t",), "think"),
    Action("theme", LOOK, "show the themes or choose one", (), "theme", "[NAME]"),
    Action("stats", LOOK, "show the statistics of the session", (), "stats"),
    Action("up", LOOK, "scroll the chat up", ("pageup",)),
    Action("down", LOOK, "scroll the chat down", ("pagedown",)),
    Action("top", LOOK, "go to the first message", ("ctrl+home",)),
    Action("bottom", LOOK, "go to the end and follow the answer", ("ctrl+end",)),
    Action("drawer", TUNE, "show or hide the settings that can be changed while chatting", ("f4",), "drawer",
           footer="tune"),
    Action("policy", TUNE, "show which experts stay, or change it", (), "policy", "[SPEC]"),
    Action("scope", TUNE, "show over what victims are chosen, or change it", (), "scope", "[NAME]"),
    Action("prefetch", TUNE, "show what is read ahead, or change it", (), "prefetch", "[NAME]"),
    Action("miss", TUNE, "show what is done about experts that the GPU lacks, or change it", (), "miss", "[NAME]"),
    Action("host_policy", TUNE, "show which experts stay in RAM behind a GPU, or change it", (), "host-policy",
           "[SPEC]"),
    Action("residency", TUNE, "show or change the share of experts that get a slot", (), "residency", "[FRACTION]"),
    Action("ram", TUNE, "show or change the budget for all memory of the process", (), "ram", "[SIZE]"),
    Action("vram", TUNE, "show or change the budget for the memory of the GPU", (), "vram", "[SIZE]"),
    Action("trace", TUNE, "record the routing from now on, or write what was recorded to FILE.npz", (), "trace",
           "start|stop FILE"),
    Action("tune", TUNE, "find out which policy suits the recorded routing; the result can be applied and kept", (),
           "tune"),
    Action("plan", MODEL, "show where the memory goes", (), "plan"),
    Action("models", MODEL, "show what is on this machine and switch to it", ("f6",), "models"),
    Action("model", MODEL, "load another model: a folder, a hub id or demo", (), "model", "NAME"),
    Action("new", SAVED, "begin a new conversation", ("ctrl+n",), "new"),
    Action("conversations", SAVED, "show the conversations, or those that hold WORDS", ("f5",), "conversations",
           "[WORDS]", footer="chats"),
    Action("resume", SAVED, "go on with a conversation", (), "resume", "ID"),
    Action("rename", SAVED, "give this conversation a title", (), "rename", "TITLE"),
    Action("delete", SAVED, "delete a conversation for good", (), "delete", "ID"),
    Action("suspend", CHAT, "put the program aside; fg in the shell brings it back", ("ctrl+z",)),
    Action("leave", CHAT, "leave, if nothing is typed", ("ctrl+d",), scope="prompt"),
    Action("quit", CHAT, "leave", ("ctrl+q",), "quit", footer="quit"),
)  # fmt: skip
BY_NAME = {action.name: action for action in ACTIONS}
BY_SLASH = {action.slash: action for action in ACTIONS if action.slash}


def parse_slash(line: str) -> tuple[Action, str]:
    """The action of a line that begins with a slash, and what follows it.

    Raises UsageError for an unknown name, and for an argument that is missing or too much.
    """
    name, *rest = line[1:].split(maxsplit=1)[:2] or [""]
    argument = rest[0].strip() if rest else ""
    action = BY_SLASH.get(name)
    if action is None:
        names = " ".join(f"/{name}" for name in sorted(BY_SLASH))
        raise UsageError(f"there is no command /{name}; there are {names} (//text sends a text that starts with /)")
    if argument and not action.argument:
        raise UsageError(f"/{name} takes nothing after it")
    if not argument and action.needs_argument:
        raise UsageError(f"/{name} needs {action.argument} after it")
    return action, argument


def groups() -> Iterator[tuple[str, list[Action]]]:
    """The actions by group, in the order of the table."""
    for group in dict.fromkeys(action.group for action in ACTIONS):
        yield group, [action for action in ACTIONS if action.group == group]


_NAMES = {"escape": "Esc", "pageup": "PgUp", "pagedown": "PgDn"}


def key_name(key: str) -> str:
    """``ctrl+r`` as people write it: ``Ctrl+R``."""
    return "+".join(_NAMES.get(part, part.capitalize()) for part in key.split("+"))


def markdown() -> str:
    """The tables of docs/chat.md."""
    parts = []
    for group, actions in groups():
        parts.append(f"### {group}\n\n| key | command | |\n| --- | --- | --- |\n")
        for action in actions:
            keys = ", ".join(key_name(key) for key in action.keys)
            usage = f"`{action.usage}`".replace("|", "\\|") if action.slash else ""
            parts.append(f"| {keys} | {usage} | {action.help} |\n")
        parts.append("\n")
    return "".join(parts)


def help_lines() -> str:
    """The same as Markdown for the screen."""
    return markdown().replace("| key | command | |", "| key | command | what it does |")
