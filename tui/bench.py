"""The flags of ``bench`` itself, and the way back from parsed flags to a command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from offload.errors import UsageError
from tui.flags import SAMPLING_FLAGS, Flag, Parser, path, typed, whole
from tui.text import check_text, decode

_DEFAULTS = {
    "--temperature": "0 is greedy (default: 1)",
    "--seed": "of the prompt and the choices; run I of --repeat has N + I - 1 (default: 0)",
}
# every answer has the length that --new-tokens says
BENCH_SAMPLING_FLAGS = tuple(
    replace(flag, help=_DEFAULTS.get(flag.name, flag.help))
    for flag in SAMPLING_FLAGS
    if flag.name not in ("--max-new-tokens", "--stop")
)


def add_bench_flags(parser: argparse.ArgumentParser) -> None:
    """Register them; the values of a parsed namespace have their types."""

    def add(group: argparse._ArgumentGroup, name: str, parse: Parser, metavar: str, text: str) -> None:
        group.add_argument(name, type=typed(parse, name), metavar=metavar, help=text)

    speed = parser.add_argument_group("speed")
    add(speed, "--prompt-tokens", whole, "N", "tokens of the prompt, which are drawn at random (default: 11)")
    add(speed, "--warmup-tokens", whole, "N", "new tokens before the measured ones (default: 32)")
    add(speed, "--new-tokens", whole, "N", "new tokens that are measured (default: 32)")
    add(speed, "--repeat", whole, "N", "measure so many times; with --compare: so many rounds (default: 1)")
    quality = parser.add_argument_group("quality")
    add(quality, "--perplexity", path, "FILE", "instead of the speed: the perplexity on a text file in UTF-8")
    add(quality, "--tokens", whole, "N", "use at most the first N tokens of the file (default: all)")
    add(quality, "--reference-out", path, "FILE", "write the probabilities for --reference of another run (overwrites)")
    add(quality, "--reference", path, "FILE", "compare with the probabilities that another run wrote")
    other = parser.add_argument_group("other")
    other.add_argument(
        "--compare",
        action="append",
        type=typed(check_text, "--compare"),
        metavar="NAME=FLAGS",
        help="run this setting, in turns with the others, each in a process of its own; may be given several times",
    )
    other.add_argument("--calibrate", action="store_true", help="instead: measure and keep the rates of this machine")
    other.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def given_flags(arguments: argparse.Namespace, flags: Iterable[Flag]) -> list[str]:
    """The shared ``flags`` that were given on the command line, as one argument each, to give them again."""
    given = []
    for flag in flags:
        value = getattr(arguments, flag.dest)
        if value is not None and flag.metavar is None:
            given.append(flag.name)
        elif value is not None:
            given += [f"{flag.name}={text}" for text in (value if flag.repeat else [value])]
    return given


def read_text(file: Path) -> str:
    """The text to take the perplexity of. Raises UsageError if there is none in ``file``."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(f"--perplexity: {file} cannot be read ({error.strerror})") from error
    text = decode(data, f"--perplexity: {file}")
    if not text.strip():
        raise UsageError(f"--perplexity: {file} is empty")
    return text
