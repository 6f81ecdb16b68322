"""Shell completion for bash, zsh and fish, made from the command line's own parser."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from offload.config import DENSE_FORMATS, DEVICES, FORMATS, KERNELS, PREFETCHES

_VALUES = {
    "--format": FORMATS,
    "--dense-format": DENSE_FORMATS,
    "--device": DEVICES,
    "--kernels": KERNELS,
    "--prefetch": PREFETCHES,
}
_FILES = re.compile(r"FILE|DIR|MODEL|\.jsonl")


@dataclass(frozen=True, slots=True)
class Option:
    """A flag. ``values`` are those it takes if they are few; ``files``: it takes a path; neither: anything or nothing.
    ``takes`` tells the last two apart."""

    flags: tuple[str, ...]
    help: str
    takes: bool
    values: tuple[str, ...]
    files: bool


@dataclass(frozen=True, slots=True)
class Command:
    """A command; the program itself has the empty name. ``files``: it takes paths as arguments."""

    name: str
    help: str
    options: tuple[Option, ...]
    arguments: tuple[str, ...]
    files: bool


def read_parser(parser: argparse.ArgumentParser) -> list[Command]:
    """The program and its commands."""
    commands = [_command("", "", parser)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            commands += [_command(name, helps.get(name, ""), sub) for name, sub in action.choices.items()]
    return commands


def _command(name: str, help: str, parser: argparse.ArgumentParser) -> Command:
    options, arguments, files = [], [], False
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        shown = " ".join((action.help or "").split())
        metavar = action.metavar if isinstance(action.metavar, str) else action.dest
        if not action.option_strings:
            arguments += list(action.choices or ())
            files = files or bool(_FILES.search(metavar))
            continue
        takes = action.nargs != 0
        values = tuple(action.choices or _VALUES.get(action.option_strings[-1], ())) if takes else ()
        is_file = takes and not values and bool(_FILES.search(metavar))
        options.append(Option(tuple(action.option_strings), shown, takes, values, is_file))
    return Command(name, help, tuple(options), tuple(arguments), files)


def bash(commands: list[Command]) -> str:
    """A function for ``complete -F``."""
    names = " ".join(command.name for command in commands if command.name)
    cases, values = [], {}
    for command in commands:
        flags = " ".join(flag for option in command.options for flag in option.flags)
        words = " ".join([flags, *command.arguments, *([] if command.name else [names])])
        cases.append(f"        {command.name or chr(39) * 2}) words='{words}' ;;")
        for option in command.options:
            if option.takes:
                found = f"$(compgen -W '{' '.join(option.values)}' -- \"$cur\")" if option.values else ""
                found = '$(compgen -f -- "$cur")' if option.files else found
                values["|".join(option.flags)] = found
    by_flag = "\n".join(f"        {flags}) COMPREPLY=({found}); return ;;" for flags, found in values.items())
    files = "|".join(command.name for command in commands if command.files) or "-"
    return f"""\
_run_local() {{
    local cur prev command words i
    cur=${{COMP_WORDS[COMP_CWORD]}}
    prev=${{COMP_WORDS[COMP_CWORD-1]}}
    command=
    for ((i = 1; i < COMP_CWORD; i++)); do
        case " {names} " in *" ${{COMP_WORDS[i]}} "*) command=${{COMP_WORDS[i]}}; break ;; esac
    done
    case "$prev" in
{by_flag}
    esac
    case "$command" in
{chr(10).join(cases)}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    case "$command" in {files}) [[ $cur != -* ]] && COMPREPLY+=($(compgen -f -- "$cur")) ;; esac
}}
complete -o filenames -F _run_local run-local
"""


def zsh(commands: list[Command]) -> str:
    """A file for a folder of ``$fpath``, or for ``source <(run-local completion zsh)``."""

    def quoted(text: str) -> str:
        return text.replace("'", "'\\''").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")

    def specs(command: Command) -> str:
        lines = []
        for option in command.options:
            value = f":value:({' '.join(option.values)})" if option.values else ":value: "
            value = ":file:_files" if option.files else value
            for flag in option.flags:
                lines.append(f"'*{flag}[{quoted(option.help)}]{value if option.takes else ''}'")
        if command.arguments:
            lines.append(f"'*:word:({' '.join(command.arguments)})'")
        elif command.files:
            lines.append("'*:file:_files'")
        return " \\\n            ".join(lines)

    names = "\n".join(f"        '{command.name}:{quoted(command.help)}'" for command in commands if command.name)
    cases = "\n".join(
        f"        {command.name})\n            _arguments {specs(command)} ;;" for command in commands if command.name
    )
    return f"""\
#compdef run-local
_run_local() {{
    local -a commands
    commands=(
{names}
    )
    if (( CURRENT == 2 )); then
        _describe command commands
        _arguments {specs(commands[0])}
        return
    fi
    local name=$words[2]
    shift words
    (( CURRENT-- ))
    case $name in
{cases}
    esac
}}
if [[ $funcstack[1] == _run_local ]]; then _run_local "$@"; else compdef _run_local run-local; fi
"""


def fish(commands: list[Command]) -> str:
    """Lines of ``complete``."""

    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    lines = ["complete -c run-local -f"]
    for command in commands:
        when = f"-n '__fish_seen_subcommand_from {command.name}'" if command.name else "-n __fish_use_subcommand"
        if command.name:
            lines.append(f"complete -c run-local -n __fish_use_subcommand -a {command.name} -d {quoted(command.help)}")
        for option in command.options:
            parts = [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags]
            value = " -r" if option.takes else ""
            value += f" -a {quoted(' '.join(option.values))}" if option.values else ""
            value += " -F" if option.files else ""
            lines.append(f"complete -c run-local {when} {' '.join(parts)}{value} -d {quoted(option.help)}")
        if command.arguments:
            lines.append(f"complete -c run-local {when} -a {quoted(' '.join(command.arguments))}")
        elif command.files:
            lines.append(f"complete -c run-local {when} -F")
    return "\n".join(lines) + "\n"


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}
