"""The settings that can be changed while chatting: how they are written, and what a changed one is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from offload.config import format_size, parse_size
from offload.errors import UsageError
from offload.events import LiveChanges


@dataclass(frozen=True, slots=True)
class Field:
    """``name`` is that of the field of LiveChanges and of the slash command."""

    name: str
    label: str
    read: Callable[[str], Any]
    show: Callable[[Any], str]


def _share(text: str) -> float:
    try:
        value = float(text.removesuffix("%").strip()) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        raise UsageError(f"residency: '{text}' is not a number; write for example 0.5 or 50%") from None
    if not 0 < value <= 1:
        raise UsageError("residency must be above 0 and at most 1 (0.5 is half)")
    return value


FIELDS = (
    Field("policy", "policy, which experts stay", str, str),
    Field("scope", "scope, where victims are looked for", str, str),
    Field("prefetch", "prefetch, what is read ahead", str, str),
    Field("miss", "miss, what is done about what is missing", str, str),
    Field("host_policy", "RAM's policy, which experts stay there", str, str),
    Field("residency", "residency, share of experts with a slot", _share, lambda value: f"{value:.3g}"),
    Field("ram", "ram, budget for all memory", lambda text: parse_size(text, "ram"), format_size),
    Field("vram", "vram, budget for the memory of the GPU", lambda text: parse_size(text, "vram"), format_size),
)
BY_NAME = {field.name: field for field in FIELDS}


def changes(name: str, text: str) -> LiveChanges:
    """The change that sets ``name`` to what ``text`` says. Raises UsageError if it says nothing that makes sense."""
    return LiveChanges(**{name: BY_NAME[name].read(text.strip())})


def describe_all(before: LiveChanges, after: LiveChanges) -> str:
    """``policy lru → ewma, scope layer → global``: what ``after`` changes."""
    new = {field.name: value for field in FIELDS if (value := getattr(after, field.name)) is not None}
    return ", ".join(describe(name, before, BY_NAME[name].show(value)) for name, value in new.items())


def describe(name: str, before: LiveChanges, text: str) -> str:
    """``policy lru → ewma``."""
    old = getattr(before, name)
    return f"{name} {'-' if old is None else BY_NAME[name].show(old)} → {text.strip()}"
