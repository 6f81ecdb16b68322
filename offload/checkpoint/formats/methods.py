"""Published ways of quantising by name, and the layouts that they use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offload.checkpoint.formats.awq import AwqLayout, AwqMethod
from offload.checkpoint.formats.bitsandbytes import BitsAndBytesLayout, BitsAndBytesMethod
from offload.checkpoint.formats.compressed import CompressedLayout, CompressedMethod
from offload.checkpoint.formats.fp8 import Fp8Layout, Fp8Method
from offload.checkpoint.formats.gguf import GgufLayout
from offload.checkpoint.formats.gptq import GptqLayout, GptqMethod
from offload.checkpoint.formats.method import ANOTHER, Method
from offload.checkpoint.formats.modelopt import ModelOptMethod
from offload.checkpoint.formats.mxfp4 import Mxfp4Layout, Mxfp4Method
from offload.checkpoint.formats.nvfp4 import Nvfp4Layout
from offload.checkpoint.formats.packed import PackedLayout, parse_fields
from offload.errors import ModelError

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Fp8Method, Mxfp4Method, CompressedMethod, GptqMethod, AwqMethod, BitsAndBytesMethod, ModelOptMethod)
}
LAYOUTS: dict[str, type[PackedLayout]] = {
    layout.kind: layout
    for layout in (
        GgufLayout,
        Fp8Layout,
        Mxfp4Layout,
        CompressedLayout,
        GptqLayout,
        AwqLayout,
        BitsAndBytesLayout,
        Nvfp4Layout,
    )
}


def get_method(config: Mapping[str, Any] | None) -> Method | None:
    """What ``quantization_config`` says; None without one. Raises ModelError, naming what is supported."""
    if not config:
        return None
    name = str(config.get("quant_method") or "")
    if name not in METHODS:
        said = " ".join(filter(None, (name, str(config.get("quant_algo") or ""))))
        if not name and "bits" in config and "group_size" in config:
            said = f"MLX, {config['bits']} bits"  # the only one that names no method
        raise ModelError(
            f"the checkpoint is quantised in a way that is not supported ({said or 'no quant_method is named'}); these "
            f"are: {', '.join(METHODS)} and GGUF files; {ANOTHER}"
        )
    try:
        return METHODS[name](config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"the quantization_config is damaged ({error}); download config.json again") from error


def parse_layout(spec: str, shape: tuple[int, ...]) -> PackedLayout | None:
    """The layout that a manifest names; None for a plain dtype. Raises ValueError for a damaged name."""
    kind, _, said = spec.partition(":")
    layout = LAYOUTS.get(kind)
    return None if layout is None else layout(tuple(shape), **parse_fields(layout, said))  # type: ignore[arg-type]
