"""The flags that commands share: one table for parsing, help, environment variables and documentation."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from offload.config import (
    DEFAULT_CONTEXT_TOKENS,
    DEFAULT_HOST_POLICY,
    DEFAULT_MAX_NEW_TOKENS,
    DEFAULT_POLICY,
    DEFAULT_PREFILL_CHUNK,
    DEFAULT_SCOPE,
    DENSE_FORMATS,
    DEVICES,
    FORMATS,
    GRAPHS,
    KERNELS,
    KV_CACHES,
    MISSES,
    PREFETCHES,
    SCOPES,
    TIERS,
    EngineSettings,
    SamplingSettings,
    parse_size,
)
from offload.errors import UsageError
from tui.text import check_text

Parser = Callable[[str, str], Any]
"""From a text and where it came from (a flag or a variable) to a value; raises UsageError naming the latter."""


def whole(text: str, source: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{source}: '{text}' is not a whole number") from None


def number(text: str, source: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{source}: '{text}' is not a number") from None


def whole_or_auto(text: str, source: str) -> int | None:
    return None if text.strip().lower() == "auto" else whole(text, source)


def size_or_auto(text: str, source: str) -> int | None:
    return None if text.strip().lower() == "auto" else parse_size(text, source)


def path(text: str, source: str) -> Path:
    if not text or "\0" in text:
        raise UsageError(f"{source}: '{text}' is no path")
    return Path(text).expanduser() if text.startswith("~/") else Path(text)


def switch(text: str, source: str) -> bool:
    value = text.strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("0", "false", "no", "off"):
        return False
    raise UsageError(f"{source}: '{text}' is not one of 1, 0, true, false, yes, no, on, off")


def typed(parse: Parser, name: str) -> Callable[[str], Any]:
    """``parse`` as argparse's ``type`` of a flag that is no :class:`Flag`."""
    return lambda text: parse(text, name)


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag ``--name`` with its twin in the environment, ``RUN_LOCAL_NAME``. ``metavar`` is None for a switch."""

    name: str
    parse: Parser
    metavar: str | None
    help: str
    repeat: bool = False

    @property
    def dest(self) -> str:
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def variable(self) -> str:
        return "RUN_LOCAL_" + self.dest.upper()

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        if self.metavar is None:
            group.add_argument(self.name, action="store_const", const="1", help=self.help)
        else:
            action = "append" if self.repeat else "store"
            group.add_argument(self.name, action=action, metavar=self.metavar, help=self.help)

    def read(self, texts: list[str], source: str) -> Any:
        values = [self.parse(text, source) for text in texts]
        return tuple(values) if self.repeat else values[-1]


MODEL_FLAGS = (
    Flag("--model", check_text, "MODEL", "folder, GGUF file, hub id (org/name) or 'demo' (default: demo)"),
    Flag("--revision", check_text, "REV", "branch, tag or commit of a hub model (default: main)"),
    Flag("--offline", switch, None, "never use the network; what is not on disk is an error"),
    Flag("--experts-dir", path, "DIR", "folder of packs, or one pack (default: the packs folder in the user's cache)"),
    Flag("--preset", check_text, "NAME", "flags that 'tune --save NAME' kept; other flags win over them"),
)
FORMAT_FLAGS = (
    Flag("--format", check_text, "FORMAT", f"of the experts' weights: {', '.join(FORMATS)} (default: native)"),
    Flag("--dense-format", check_text, "FORMAT", f"of all other weights: {', '.join(DENSE_FORMATS)} (default: native)"),
)
MEMORY_FLAGS = (
    Flag(
        "--device",
        check_text,
        "DEVICE",
        f"where to compute: {', '.join(DEVICES)}; cuda:NUMBER and simulated:HARDWARE choose one (default: auto)",
    ),
    Flag("--vram", size_or_auto, "SIZE", "hard budget for the device's own memory: 8GiB, auto (default)"),
    Flag("--ram", size_or_auto, "SIZE", "hard budget for all memory of the process: 8GiB, 512MiB, auto (default)"),
    Flag("--residency", number, "FRACTION", "give slots to at most this share of the experts, above 0 to 1"),
    Flag(
        "--tiers",
        check_text,
        "NAME",
        f"experts in both VRAM and RAM or in one: {' or '.join(TIERS)} (default: {TIERS[0]})",
    ),
    Flag(
        "--ctx",
        whole,
        "TOKENS",
        f"tokens of prompt and answer together (default: the model's own, at most {DEFAULT_CONTEXT_TOKENS})",
    ),
    Flag(
        "--prefill-chunk",
        whole_or_auto,
        "TOKENS",
        f"prompt tokens in one forward pass, or auto: what the budget allows (default: {DEFAULT_PREFILL_CHUNK})",
    ),
    Flag(
        "--kv-cache",
        check_text,
        "NAME",
        f"keys and values as they are or in 8 bits: {' or '.join(KV_CACHES)} (default: {KV_CACHES[0]})",
    ),
    Flag(
        "--graphs",
        check_text,
        "NAME",
        "on a GPU, launch what stands between the experts as one while a token is decoded: "
        f"{', '.join(GRAPHS)} (default: auto, where tests/gpu has found that right on this card)",
    ),
    Flag("--read-workers", whole, "N", f"threads that read experts (default: {EngineSettings().read_workers})"),
)
RUN_FLAGS = (
    Flag("--policy", check_text, "SPEC", f"which experts stay: NAME or NAME:KEY=VALUE (default: {DEFAULT_POLICY})"),
    Flag(
        "--learn-from",
        path,
        "TRACE",
        "a trace that policy and prefetch learn from before they start; may be given several times",
        repeat=True,
    ),
    Flag("--scope", check_text, "SCOPE", f"who shares slots: {' or '.join(SCOPES)} (default: {DEFAULT_SCOPE})"),
    Flag("--prefetch", check_text, "NAME", f"reads ahead of the router: {', '.join(PREFETCHES)} (default: off)"),
    Flag(
        "--miss",
        check_text,
        "NAME",
        "experts that the device lacks and RAM holds: copied there, computed on the CPU, or split by what they cost: "
        f"{', '.join(MISSES)} (default: auto)",
    ),
    Flag(
        "--host-policy",
        check_text,
        "SPEC",
        f"which experts stay in RAM behind a GPU, as --policy for its slots (default: {DEFAULT_HOST_POLICY})",
    ),
    Flag(
        "--prefetch-bytes",
        size_or_auto,
        "SIZE",
        "most bytes that a token may read ahead; auto (default): what its experts weigh, or half of it on the CPU",
    ),
    Flag("--kernels", check_text, "NAME", f"products of quantised weights: {' or '.join(KERNELS)} (default: auto)"),
    Flag("--verify", switch, None, "check every checksum of the expert file before starting"),
    Flag("--stats-json", path, "FILE", "write the statistics of the session here at its end (overwrites)"),
    Flag("--trace-out", path, "FILE", "write the routing trace here at the end (overwrites)"),
    Flag("--cache-log", path, "FILE", "write every decision of the expert cache here at the end (overwrites)"),
)
SAMPLING_FLAGS = (
    Flag("--temperature", number, "T", "0 is greedy (default: the model's own)"),
    Flag("--top-k", whole, "K", "keep the K most likely tokens, 0 for all (default: the model's own)"),
    Flag("--top-p", number, "P", "keep the most likely tokens of total probability P (default: the model's own)"),
    Flag("--min-p", number, "P", "drop tokens below P times the best one's probability (default: the model's own)"),
    Flag("--repetition-penalty", number, "R", "above 1 discourages repetition (default: the model's own)"),
    Flag("--max-new-tokens", whole, "N", f"longest answer in tokens (default: {DEFAULT_MAX_NEW_TOKENS})"),
    Flag("--stop", check_text, "TEXT", "end the answer before TEXT; may be given several times", repeat=True),
    Flag("--seed", whole, "N", "for the same answers again (default: a new one each time)"),
)
BATCH_FLAGS = (
    Flag("--batch-size", whole_or_auto, "N", "rows that share each forward pass; auto (default): what fits and pays"),
)
ENGINE_FIELDS = {"ctx": "context_tokens", "batch_size": "batch_rows"}  # where a flag and its field differ in name
_ENGINE_FLAGS = (*MODEL_FLAGS, *FORMAT_FLAGS, *MEMORY_FLAGS, *RUN_FLAGS, *BATCH_FLAGS)
_FRONT_END_FLAGS = ("stats_json", "preset")


@dataclass(frozen=True, slots=True)
class FlagValues:
    """Values of the shared flags that were given, and the sources of those that were no flags, by the flags' names."""

    given: dict[str, Any]
    sources: dict[str, str] = field(default_factory=dict)

    def engine(self) -> EngineSettings:
        """Raises UsageError for values that make no sense."""
        names = {flag.dest for flag in _ENGINE_FLAGS} - set(_FRONT_END_FLAGS)
        values = {ENGINE_FIELDS.get(name, name): self.given[name] for name in names if name in self.given}
        if "seed" in self.given:  # a sampling flag, which also decides what a random policy draws
            values["seed"] = self.given["seed"]
        return EngineSettings(**values)

    def sampling(self) -> SamplingSettings:
        """Raises UsageError for values that make no sense."""
        return SamplingSettings(
            **{name: self.given[name] for name in SamplingSettings.field_names() if name in self.given}
        )

    def blame(self, message: str) -> str:
        """A usage message that starts with a flag's name, naming instead the source that the value came from."""
        match = re.match(r"--[a-z-]+", message)
        source = self.sources.get(match.group()) if match else None
        return source + message[match.end() :] if match and source else message


class KeptFlags(Protocol):
    """Flags that a file holds, as :class:`tui.config_file.Kept`."""

    @property
    def texts(self) -> Mapping[str, list[str]]: ...

    def named(self, dest: str) -> str: ...


def read_flags(
    arguments: argparse.Namespace, flags: Iterable[Flag], environ: Mapping[str, str], kept: Sequence[KeptFlags] = ()
) -> FlagValues:
    """What was given for ``flags``: the flag if there is one, else its variable, else what the first of ``kept`` says.

    An empty variable counts as unset. Raises UsageError naming the flag or the source.
    """
    values = FlagValues({}, {})
    for flag in flags:
        given = getattr(arguments, flag.dest)
        if given is not None:
            values.given[flag.dest] = flag.read(given if flag.repeat else [given], flag.name)
        elif text := environ.get(flag.variable):
            values.given[flag.dest] = flag.read([text], flag.variable)
            values.sources[flag.name] = flag.variable
        elif (found := next((one for one in kept if flag.dest in one.texts), None)) is not None:
            source = found.named(flag.dest)
            values.given[flag.dest] = flag.read(list(found.texts[flag.dest]), source)
            values.sources[flag.name] = source
    return values
