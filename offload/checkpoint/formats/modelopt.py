"""What NVIDIA's Model Optimizer writes (``quant_method`` ``modelopt``, or ``hf_quant_config.json``).

Matrices are in NVFP4 (``nvfp4.py``) or in FP8 with ``X.weight_scale``, one for a matrix or, in MXFP8, an exponent for
32 inputs; ``MIXED_PRECISION`` says which for each module. ``X.input_scale`` and the scales of an 8-bit KV cache are
not used. Source: its repository (``export/quant_utils.py``, ``quantization/qtensor``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from offload.checkpoint.formats.fp8 import Fp8Method
from offload.checkpoint.formats.method import ANOTHER, Method, Read
from offload.checkpoint.formats.nvfp4 import Nvfp4Layout, find_nvfp4, without_parts
from offload.checkpoint.formats.packed import Entries, PackedLayout, PackedTensor
from offload.errors import ModelError

_NVFP4 = ("NVFP4", "W4A16_NVFP4")
_ALGORITHMS = (*_NVFP4, "FP8", "MXFP8")
_MIXED = "MIXED_PRECISION"


class ModelOptMethod(Method):
    name = "modelopt"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._of_layer = _algorithms_of_layers(config)
        said = str(config.get("quant_algo") or "NVFP4").upper()
        for algorithm in (said, *sorted(set(self._of_layer.values()))):
            if algorithm not in (*_ALGORITHMS, _MIXED):
                raise ModelError(
                    f"the modelopt quant_algo '{algorithm}' is not supported; these are: "
                    f"{', '.join((*_ALGORITHMS, _MIXED))}; {ANOTHER}"
                )
        self._said = said
        self._fp8 = Fp8Method({})

    def find(self, entries: Entries, read: Read) -> dict[str, PackedTensor]:
        for key, entry in entries.items():
            stacked = entry.dtype is torch.uint8 and f"{key}_weight_scale" in entries
            if (stacked or key.endswith(".pre_quant_scale")) and not key.startswith("mtp."):  # those are not loaded
                what = "holds all experts of a layer" if stacked else "scales inputs"
                raise ModelError(f"the modelopt tensor {key} {what}, which is not supported; {ANOTHER}")
        found = find_nvfp4(entries, "", "_scale_2", divides=0)
        return found | self._fp8.find(without_parts(entries, found), read)

    def predict(self, shape: tuple[int, int], dtype: torch.dtype, transposed: bool) -> PackedLayout | None:
        experts = {algorithm for name, algorithm in self._of_layer.items() if "experts" in name.split(".")}
        if self._said in _NVFP4 or experts & set(_NVFP4):
            return Nvfp4Layout(shape, 0)
        return self._fp8.predict(shape, dtype, transposed) if self._said != _MIXED or experts else None


def _algorithms_of_layers(config: Mapping[str, Any]) -> dict[str, str]:
    """By module, if they differ. Some releases wrote them one level deeper."""
    layers = config.get("quantized_layers") or {}
    layers = layers.get("quantized_layers", layers)
    return {name: str(layer.get("quant_algo") or "").upper() for name, layer in layers.items()}
