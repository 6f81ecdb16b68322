"""Which families are tested in which published format: the matrix of tests and the table in the manual go by it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tests.gguf_models import GGUF_MODELS, build_gguf
from tests.published_models import AWQ_SIZES, FORMATS, Format, Pair, build_published, publish


def published(name: str, family: str, folder: Path) -> Pair:
    """A checkpoint of ``family`` in a format of :data:`FORMATS`, in float32 as far as it says nothing else."""
    form = FORMATS[name]
    sizes = form.sizes if family == form.architecture else AWQ_SIZES
    return publish(Format(family, form.quantise, form.config, sizes, torch.float32), folder)


PUBLISHED: dict[str, dict[str, Callable[[Path], Pair]]] = {
    name: {family: partial(published, name, family) for family in families}
    for name, families in {
        "fp8": ("deepseek_v3", "qwen3_moe", "minimax_m2", "glm4_moe", "qwen3_next", "deepseek_v32"),
        "nvfp4": ("qwen3_moe", "deepseek_v3", "minimax_m2", "glm4_moe"),
        "compressed int4": ("deepseek_v3", "qwen3_moe", "glm4_moe"),
        "gptq": ("qwen3_moe", "qwen2_moe", "mixtral"),
        "awq": ("qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe"),
        "nf4": ("qwen3_moe", "mixtral", "olmoe"),
    }.items()
} | {
    "mxfp4": {"gpt_oss": partial(build_published, "mxfp4")},
    "gguf": {model.architecture: partial(build_gguf, name) for name, model in GGUF_MODELS.items()},
}
"""Families that are published in a format, and how to build a tiny one."""

WORDS = {
    "fp8": "FP8", "compressed int4": "compressed-tensors", "gptq": "GPTQ", "awq": "AWQ", "nf4": "bitsandbytes",
    "mxfp4": "MXFP4", "nvfp4": "NVFP4", "gguf": "GGUF",
}  # fmt: skip
"""What people call them."""


def formats_of(family: str) -> tuple[str, ...]:
    """The formats that ``family`` is tested in; those that ``test_published`` or ``test_gguf`` go through with it, too,
    without a star.
    """
    tested = {WORDS[name] for name, families in PUBLISHED.items() if family in families}
    through = {word for name, form in FORMATS.items() for word in _words_of(name) if form.architecture == family}
    through |= {"GGUF" for model in GGUF_MODELS.values() if model.architecture == family}
    return tuple(sorted(through | {f"{word}*" for word in tested - through}))


def _words_of(name: str) -> list[str]:
    """Of an entry of :data:`FORMATS`, by the beginning of its name."""
    return [word for start, word in WORDS.items() if name.startswith(start.split()[0])]
