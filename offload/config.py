"""Frozen settings, validated once, and the parsing of sizes. Standard library only."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from offload.errors import UsageError

_UNITS = {
    "": 1, "b": 1,
    "k": 2**10, "kib": 2**10, "kb": 10**3,
    "m": 2**20, "mib": 2**20, "mb": 10**6,
    "g": 2**30, "gib": 2**30, "gb": 10**9,
    "t": 2**40, "tib": 2**40, "tb": 10**12,
}  # fmt: skip
DEFAULT_CONTEXT_TOKENS = 4096
DEFAULT_MAX_NEW_TOKENS = 512
DEFAULT_PREFILL_CHUNK = 512
MAX_BATCH_ROWS = 256
DEFAULT_POLICY = "foresight"
DEFAULT_HOST_POLICY = "foresight"
"""Of the RAM behind a device's slots: the best on the public traces (docs/devices.md, Tiers)."""
DEFAULT_SCOPE = "global"
DEVICES = ("auto", "cpu", "cuda", "simulated")
TIERS = ("inclusive", "exclusive")
FORMATS = ("native", "int8", "int4", "int4-g32", "int4-g128", "mixed")
DENSE_FORMATS = ("native", "int8", "int4")
KERNELS = ("auto", "torch")
KV_CACHES = ("dynamic", "fp8")
PREFETCHES = ("off", "auto", "next-gate", "layer-markov", "previous-token", "popularity")
SCOPES = ("layer", "global")
MISSES = ("auto", "fetch", "cpu")
GRAPHS = ("auto", "on", "off")


def parse_size(text: str, flag: str) -> int:
    """Bytes of a size such as ``8GiB``, ``512MiB``, ``1500M`` (binary) or ``2GB`` (decimal).

    Raises UsageError, naming ``flag``, for anything else and for sizes below one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    factor = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f"{flag}: '{text}' is not a size; write for example 8GiB or 512MiB")
    size = float(match.group(1)) * factor
    if size < 1:
        raise UsageError(f"{flag}: the size must be above zero")
    if size >= 2**63:
        raise UsageError(f"{flag}: '{text}' is more than any machine has")
    return int(size)


def format_size(size: float) -> str:
    """A size for people: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def format_count(count: float) -> str:
    """A large number of things for people: ``46.7 billion``."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.1f} {word}"
    return str(round(count))


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def _is_number(value: object) -> bool:
    # a batch row can hold a whole number that no float can
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63 and math.isfinite(value)
    )


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How tokens are chosen. ``None`` means: as the checkpoint's generation_config says, or the library's neutral.

    ``temperature`` 0 is greedy. ``seed`` None draws a fresh one. ``ignore_eos`` goes on to ``max_new_tokens`` past end
    tokens: it is for measuring, and neither a flag nor a row of a batch can ask for it.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            _check(value is None or _is_number(value), f"--{name.replace('_', '-')}: '{value}' is not a number")
        for name in ("top_k", "max_new_tokens", "seed"):
            value = getattr(self, name)
            _check(
                value is None or (isinstance(value, int) and not isinstance(value, bool)),
                f"--{name.replace('_', '-')}: '{value}' is not a whole number",
            )
            _check(value is None or value < 2**63, f"--{name.replace('_', '-')}: the number is too large")
        _check(self.max_new_tokens is not None and self.max_new_tokens >= 1, "--max-new-tokens must be at least 1")
        _check(self.temperature is None or self.temperature >= 0, "--temperature must be 0 (greedy) or above")
        _check(self.top_k is None or self.top_k >= 0, "--top-k must be 0 (off) or above")
        _check(self.top_p is None or 0 < self.top_p <= 1, "--top-p must be above 0 and at most 1")
        _check(self.min_p is None or 0 <= self.min_p <= 1, "--min-p must be between 0 and 1")
        _check(self.repetition_penalty is None or self.repetition_penalty > 0, "--repetition-penalty must be above 0")
        _check(self.seed is None or 0 <= self.seed < 2**63, "--seed must be between 0 and 2**63 - 1")
        _check(
            isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop),
            "--stop: every stop string must have at least one character",
        )
        _check(isinstance(self.ignore_eos, bool), "ignore_eos must be True or False")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The fields that a flag or a row of a batch may set."""
        return tuple(field.name for field in fields(cls) if field.name != "ignore_eos")

    def overridden(self, values: dict[str, Any]) -> SamplingSettings:
        """A copy with some fields replaced, as a batch row may ask. Raises UsageError for a bad value."""
        if isinstance(values.get("stop"), str):
            values = values | {"stop": (values["stop"],)}
        elif isinstance(values.get("stop"), list):
            values = values | {"stop": tuple(values["stop"])}
        elif "stop" in values and values["stop"] is None:
            values = values | {"stop": ()}
        return replace(self, **values)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Everything that decides how a model is opened. Sizes in bytes; ``None`` means ``auto``.

    ``batch_rows`` is how many rows of a batch are to share a forward pass, ``row_tokens`` how many tokens of prompt and
    answer most of them have together: room for so many is kept.
    ``seed`` is that of policies that draw lots (None: 0).
    """

    model: str = "demo"
    revision: str | None = None
    device: str = "auto"
    ram: int | None = None
    vram: int | None = None
    tiers: str = "inclusive"
    residency: float | None = None
    context_tokens: int | None = None
    format: str = "native"
    dense_format: str = "native"
    kernels: str = "auto"
    graphs: str = "auto"
    kv_cache: str = "dynamic"
    policy: str = DEFAULT_POLICY
    host_policy: str = DEFAULT_HOST_POLICY
    scope: str = DEFAULT_SCOPE
    prefetch: str = "off"
    miss: str = "auto"
    prefetch_bytes: int | None = None
    experts_dir: Path | None = None
    prefill_chunk: int | None = DEFAULT_PREFILL_CHUNK
    batch_rows: int | None = 1
    row_tokens: int | None = None
    read_workers: int = 4
    verify: bool = False
    offline: bool = False
    trace_out: Path | None = None
    learn_from: tuple[Path, ...] = ()
    cache_log: Path | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check(bool(self.model.strip()), "--model: the name is empty; give a folder, a hub id (org/name) or 'demo'")
        kind, _, detail = self.device.partition(":")
        _check(kind != "mps", "--device mps: there is none yet; use --device cpu (docs/devices.md says why)")
        _check(
            kind in DEVICES and (not detail or kind in ("cuda", "simulated")),
            f"--device: '{self.device}' is not one of {', '.join(DEVICES)}, cuda:NUMBER or simulated:HARDWARE",
        )
        for flag, value, known in (
            ("--format", self.format, FORMATS),
            ("--dense-format", self.dense_format, DENSE_FORMATS),
            ("--kernels", self.kernels, KERNELS),
            ("--graphs", self.graphs, GRAPHS),
            ("--kv-cache", self.kv_cache, KV_CACHES),
            ("--scope", self.scope, SCOPES),
            ("--prefetch", self.prefetch, PREFETCHES),
            ("--miss", self.miss, MISSES),
            ("--tiers", self.tiers, TIERS),
        ):
            _check(value in known, f"{flag}: '{value}' is not one of {', '.join(known)}")
        _check(self.ram is None or self.ram >= 1, "--ram must be above zero")
        _check(self.vram is None or self.vram >= 1, "--vram must be above zero")
        _check(self.prefetch_bytes is None or self.prefetch_bytes >= 1, "--prefetch-bytes must be above zero")
        _check(
            self.residency is None or 0 < self.residency <= 1, "--residency must be above 0 and at most 1 (0.5 is half)"
        )
        _check(self.context_tokens is None or self.context_tokens >= 2, "--ctx must be at least 2 tokens")
        _check(
            self.prefill_chunk is None or self.prefill_chunk >= 1, "--prefill-chunk must be auto or at least 1 token"
        )
        _check(
            self.batch_rows is None or 1 <= self.batch_rows <= MAX_BATCH_ROWS,
            f"--batch-size must be auto or between 1 and {MAX_BATCH_ROWS}",
        )
        _check(1 <= self.read_workers <= 64, "--read-workers must be between 1 and 64")
