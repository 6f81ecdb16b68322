"""The flags of ``trace`` and ``tune``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from offload.config import parse_size
from offload.errors import UsageError
from tui.flags import Parser, number, path, typed, whole
from tui.text import check_text

AddParser = Callable[[str, str], argparse.ArgumentParser]


def listed(parse: Parser, name: str) -> Callable[[str], tuple[Any, ...]]:
    """Values between commas."""

    def read(text: str) -> tuple[Any, ...]:
        values = tuple(parse(part.strip(), name) for part in text.split(",") if part.strip())
        if not values:
            raise UsageError(f"{name}: the list is empty")
        return values

    return read


def add_trace_commands(add: AddParser) -> None:
    """The commands below ``trace``; ``add`` makes a parser from a name and a summary."""
    info = add("info", "show what a trace says about caching")
    _files(info)
    info.add_argument(
        "--recall",
        type=listed(whole, "--recall"),
        metavar="LIST",
        default=(),
        help="also how many of the next layer's experts predictors foretell with so many guesses, such as 4,8",
    )
    info.add_argument("--json", action="store_true", help="print JSON, a list with an object for each file")
    for name, summary in (
        ("convert", "turn routing that another program wrote into a trace, or a trace into text"),
        ("merge", "put traces of one model together"),
    ):
        parser = add(name, summary)
        if name == "convert":
            parser.add_argument("files", metavar="IN", type=typed(path, "IN"), nargs=1, help="the file to read")
        else:
            _files(parser)
        parser.add_argument(
            "output",
            metavar="OUT",
            type=typed(path, "OUT"),
            help="new file: .npz (a trace), .csv or .jsonl (overwrites)",
        )
        _add(parser, "--form", check_text, "NAME", "how IN is written; without it its beginning tells")
        _add(parser, "--model", check_text, "NAME", "the model's name (default: what IN says)")
        _add(parser, "--experts", whole, "N", "experts of a layer (default: what IN says, or the largest id)")
        _add(parser, "--phase", check_text, "NAME", "of rows that name none: decode (default) or prefill")
        parser.add_argument(
            "--sort", action="store_true", help="IN is a trace: put its rows in order, and drop weights that are none"
        )
    split = add("split", "divide a trace by request")
    split.add_argument("file", metavar="IN", type=typed(path, "IN"), help="the trace")
    split.add_argument("output", metavar="OUT", type=typed(path, "OUT"), help="OUT-0.npz, OUT-1.npz ... are written")
    split.add_argument("--by", choices=["request"], default="request", help="a file for each request (default)")
    _add(split, "--folds", whole, "N", "N files instead, with the requests dealt out in turns")
    _add_synth(add("synth", "make a trace whose statistics are set by flags"))


def _add_synth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT", type=typed(path, "OUT"), help="new file: .npz, .csv or .jsonl")
    _add(
        parser, "--like", check_text, "MODEL", "start from published figures: mixtral-8x7b, qwen3-30b-a3b, gpt-oss-20b"
    )
    _add(parser, "--layers", whole, "N", "MoE layers (default: 24)")
    _add(parser, "--experts", whole, "N", "experts of a layer (default: 32)")
    _add(parser, "--top-k", whole, "K", "experts of a token (default: 4)")
    _add(parser, "--tokens", whole, "N", "decoded tokens of each request (default: 256)")
    _add(parser, "--requests", whole, "N", "requests (default: 4)")
    _add(parser, "--prompt-tokens", whole, "N", "tokens of each prompt, which run in one pass (default: 32)")
    parser.add_argument(
        "--repeat", metavar="SHARE", help="how often the first choice is repeated: 0.3, or 0:0.1,15:0.3"
    )
    parser.add_argument(
        "--overlap", metavar="SHARE", help="share of a token's experts that the one before had, likewise"
    )
    parser.add_argument("--topic", metavar="S", help="how much a topic prefers some experts: 0 not, 1 some, 2 much")
    _add(parser, "--topic-tokens", number, "N", "tokens that a topic lasts on average (default: 200)")
    _add(parser, "--skew", number, "S", "how much some experts are preferred whatever the topic (default: 0.5)")
    _add(parser, "--coupling", number, "SHARE", "share of the choices that follow the layer before (default: 0.3)")
    _add(parser, "--seed", whole, "N", "for another trace (default: 0)")


def add_tune_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "traces", metavar="TRACE", type=typed(path, "TRACE"), nargs="+", help="traces of one model, of any known form"
    )
    sizes = parser.add_argument_group("cache sizes")

    def add(group: argparse._ArgumentGroup, name: str, read: Callable[[str], Any], metavar: str, text: str) -> None:
        group.add_argument(name, type=read, metavar=metavar, help=text)

    add(sizes, "--residency", listed(number, "--residency"), "LIST", "shares of the experts (default: 0.125,0.25,0.5)")
    add(sizes, "--slots", typed(whole, "--slots"), "N", "your budget, in slots")
    add(sizes, "--ram", typed(parse_size, "--ram"), "SIZE", "your budget: all memory of the process")
    add(sizes, "--vram", typed(parse_size, "--vram"), "SIZE", "your budget: memory of the GPU")
    add(sizes, "--expert-size", typed(parse_size, "--expert-size"), "SIZE", "of an expert (default: the trace's own)")
    add(
        sizes, "--resident-size", typed(parse_size, "--resident-size"), "SIZE",
        "of everything but the experts (default: the trace's own)",
    )  # fmt: skip
    what = parser.add_argument_group("candidates")
    what.add_argument(
        "--policy",
        action="append",
        type=typed(check_text, "--policy"),
        metavar="LIST",
        help="policies, such as lru,ewma:half_life=4|16 (default: all that can run)",
    )
    add(what, "--scope", listed(check_text, "--scope"), "LIST", "layer, global or both (default: layer,global)")
    add(what, "--predictor", listed(check_text, "--predictor"), "LIST", "what is read ahead (default: off)")
    how = parser.add_argument_group("measuring")
    add(how, "--folds", typed(whole, "--folds"), "N", "parts of the requests, each scored by itself (default: 5)")
    add(how, "--requests", typed(whole, "--requests"), "N", "use the first N requests only (default: all)")
    how.add_argument("--cold", action="store_true", help="empty the cache before every request")
    add(how, "--seed", typed(whole, "--seed"), "N", "of what is drawn at random (default: 0)")
    add(how, "--hardware", typed(check_text, "--hardware"), "NAME", "a machine, or a file of its rates: rank by speed")
    add(how, "--jobs", typed(whole, "--jobs"), "N", "processes (default: one for each core)")
    out = parser.add_argument_group("results")
    add(out, "--plot", typed(path, "--plot"), "FILE.svg", "draw the curves (overwrites)")
    add(out, "--csv", typed(path, "--csv"), "FILE", "write all results as a table (overwrites)")
    out.add_argument("--json", action="store_true", help="print one JSON object instead of table and chart")
    add(out, "--save", typed(check_text, "--save"), "NAME", "keep the flags as a preset, for --preset NAME")


def _files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", type=typed(path, "FILE"), nargs="+", help="traces, of any known form")


def _add(parser: argparse.ArgumentParser, name: str, parse: Parser, metavar: str, text: str) -> None:
    parser.add_argument(name, type=typed(parse, name), metavar=metavar, help=text)
