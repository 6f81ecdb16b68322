"""What a bench was asked to do, checked once. Standard library only."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from offload.errors import UsageError

DEFAULT_PROMPT_TOKENS = 11
DEFAULT_WARMUP_TOKENS = 32
DEFAULT_NEW_TOKENS = 32

Mode = Literal["speed", "perplexity", "calibrate"]


@dataclass(frozen=True, slots=True)
class Workload:
    """One measured generation, in tokens: a prompt, then new ones to warm the expert cache, then the measured ones."""

    prompt: int = DEFAULT_PROMPT_TOKENS
    warmup: int = DEFAULT_WARMUP_TOKENS
    new: int = DEFAULT_NEW_TOKENS

    @property
    def marked(self) -> int:
        """New tokens before the measured part: at least the first, which comes from the prefill."""
        return max(1, self.warmup)

    @property
    def total(self) -> int:
        """Tokens of prompt and answer together."""
        return self.prompt + self.marked + self.new

    def check_context(self, tokens: int) -> None:
        """Raises UsageError if a context of ``tokens`` is too small."""
        if self.total > tokens:
            raise UsageError(
                f"--ctx: {self.total} tokens of prompt, warm-up and measured part do not fit a context of {tokens}; "
                "give a larger --ctx, or fewer tokens"
            )


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """The flags of ``bench`` itself; None is "not given". Raises UsageError for values and pairs that make no sense."""

    prompt_tokens: int | None = None
    warmup_tokens: int | None = None
    new_tokens: int | None = None
    repeat: int | None = None
    compare: tuple[str, ...] = ()
    perplexity: Path | None = None
    tokens: int | None = None
    reference: Path | None = None
    reference_out: Path | None = None
    calibrate: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("prompt_tokens", 1),
            ("warmup_tokens", 0),
            ("new_tokens", 1),
            ("repeat", 1),
            ("tokens", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{flag_name(name)} must be at least {least}")
        self._refuse("--calibrate", self.calibrate, set(self.field_names()) - {"calibrate", "json"})
        speed = {"prompt_tokens", "warmup_tokens", "new_tokens", "repeat"}
        self._refuse("--perplexity", self.perplexity is not None, speed)
        for name in ("tokens", "reference", "reference_out"):
            if getattr(self, name) is not None and self.perplexity is None:
                raise UsageError(f"{flag_name(name)} belongs to --perplexity FILE")
        self._refuse("--compare", bool(self.compare), {"reference", "reference_out"})
        self._refuse("--reference", self.reference is not None, {"reference_out"})
        text, out = self.perplexity, self.reference_out
        if text is not None and out is not None and out.resolve() == text.resolve():
            raise UsageError(f"--reference-out: {out} is the text itself; choose another name")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    def given(self) -> set[str]:
        """The fields that do not have their default."""
        return {item.name for item in fields(self) if getattr(self, item.name) != item.default}

    @property
    def mode(self) -> Mode:
        """What is done, once or (with ``compare``) for each setting."""
        return "calibrate" if self.calibrate else "speed" if self.perplexity is None else "perplexity"

    @property
    def workload(self) -> Workload:
        given = (self.prompt_tokens, self.warmup_tokens, self.new_tokens)
        default = Workload()
        return Workload(
            *(d if g is None else g for g, d in zip(given, (default.prompt, default.warmup, default.new), strict=True))
        )

    @property
    def rounds(self) -> int:
        return 1 if self.repeat is None else self.repeat

    def child_flags(self) -> list[str]:
        """The flags that every setting of a comparison gets. ``--compare`` and ``--repeat`` stay with the parent."""
        names = ("prompt_tokens", "warmup_tokens", "new_tokens", "perplexity", "tokens")
        return [f"{flag_name(name)}={getattr(self, name)}" for name in names if getattr(self, name) is not None]

    def _refuse(self, flag: str, given: bool, others: set[str]) -> None:
        if not given:
            return
        for name in sorted(others):
            if name in self.given():
                raise UsageError(f"{flag} and {flag_name(name)} do not go together")


@dataclass(frozen=True, slots=True)
class Setting:
    """One side of a comparison: its name and the flags that it has on top of the common ones."""

    name: str
    flags: tuple[str, ...]


def parse_settings(texts: Iterable[str], check: Callable[[list[str]], None]) -> list[Setting]:
    """The settings of ``--compare NAME=FLAGS``. ``check`` parses the flags of one and raises UsageError.

    Raises UsageError naming the setting.
    """
    settings: list[Setting] = []
    for text in texts:
        name, equals, flags = text.partition("=")
        name = name.strip()
        if not equals or not name or name.startswith("-"):
            raise UsageError(
                f"--compare: '{text}' is not NAME=FLAGS; write for example --compare 'half=--residency 0.5'"
            )
        if any(setting.name == name for setting in settings):
            raise UsageError(f"--compare: there are two settings called '{name}'")
        try:
            parts = shlex.split(flags)
            check(parts)
        except ValueError as error:  # a quotation mark without its twin
            raise UsageError(f"--compare {name}: {error}") from error
        except UsageError as error:
            raise UsageError(f"--compare {name}: {error}") from error
        settings.append(Setting(name, tuple(parts)))
    return settings


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")
