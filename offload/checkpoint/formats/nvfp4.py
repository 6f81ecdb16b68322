"""NVFP4: NVIDIA's checkpoints (``modelopt.py``), and those of llm-compressor (``nvfp4-pack-quantized``).

A weight is a float of 4 bits as in MXFP4, two in a byte, the first in its low half. 16 weights of a row share a
scale, a float of 8 bits (e4m3), and all of a matrix one more in float32. modelopt has ``X.weight``, uint8 [outputs,
inputs / 2], ``X.weight_scale`` [outputs, inputs / 16] and ``X.weight_scale_2``, one number that multiplies.
compressed-tensors has ``X.weight_packed``, ``X.weight_scale`` and ``X.weight_global_scale``, which divides. A weight
is code times scale in float32, where the scale was rounded too, then rounded to the model's dtype. ``X.input_scale``
and ``X.input_global_scale`` are for inputs of 4 bits and not used: products are made in the model's dtype. Source:
the repositories of compressed-tensors (``compressors/nvfp4``, ``lifecycle``) and NVIDIA's Model-Optimizer
(``qtensor/nvfp4_tensor.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from offload.checkpoint.formats.method import ANOTHER
from offload.checkpoint.formats.mxfp4 import PAIRS
from offload.checkpoint.formats.packed import Entries, PackedLayout, PackedTensor, Part
from offload.errors import ModelError

GROUP = 16


@dataclass(frozen=True)
class Nvfp4Layout(PackedLayout):
    """``divides`` is 1 if scales are divided by the matrix's own, 0 if they are multiplied."""

    kind = "nvfp4"

    divides: int

    @property
    def parts(self) -> tuple[Part, ...]:
        outputs, inputs = self.shape
        return (
            Part("weight", (outputs, inputs // 2), torch.uint8),
            Part("scale", (outputs, inputs // GROUP), torch.float8_e4m3fn),
            Part("whole", (1,), torch.float32),
        )

    def block(self, parts: tuple[torch.Tensor, ...], start: int, stop: int) -> torch.Tensor:
        weight, scale, whole = parts
        weight, scale = weight[start:stop], scale[start:stop].float()
        values = PAIRS.to(weight.device).index_select(0, weight.reshape(-1).int()).view(*scale.shape, GROUP)
        values *= (scale / whole if self.divides else scale * whole)[..., None]
        return values.view(len(weight), -1)

    def finite(self, parts: tuple[torch.Tensor, ...]) -> bool:
        _, scale, whole = parts
        of_all = 1 / whole if self.divides else whole
        return bool(of_all.isfinite()) and bool(scale.float().isfinite().all())


def find_nvfp4(entries: Entries, suffix: str, whole: str, divides: int) -> dict[str, PackedTensor]:
    """The matrices of ``entries`` with codes in ``X.weight`` + ``suffix`` and one number in ``X.weight`` + ``whole``.

    Raises ModelError if parts are missing or do not fit each other.
    """
    found = {}
    for key, entry in entries.items():
        if entry.dtype is not torch.uint8 or not key.endswith(f".weight{suffix}"):
            continue
        name = key.removesuffix(suffix)
        keys = (key, f"{name}_scale", f"{name}{whole}")
        for part in keys[1:]:
            if part not in entries:
                raise ModelError(f"the NVFP4 tensor {key} has no scales ({part}); download the checkpoint again")
        if len(entry.shape) != 2:
            raise ModelError(
                f"the NVFP4 tensor {key} {list(entry.shape)} is no matrix, which is not supported; {ANOTHER}"
            )
        layout = Nvfp4Layout((entry.shape[0], 2 * entry.shape[1]), divides)
        for part, wanted in zip(keys[1:], layout.parts[1:], strict=True):
            there = entries[part]
            fits = there.shape == wanted.shape or math.prod(there.shape) == math.prod(wanted.shape) == 1
            if not fits or there.dtype != wanted.dtype or layout.shape[1] % GROUP:
                shapes = f"{list(there.shape)} do not fit the weights {key} {list(entry.shape)}"
                raise ModelError(f"the scales {part} {shapes}")
        found[name] = PackedTensor(layout, keys)
    return found


def without_parts(entries: Entries, found: Mapping[str, PackedTensor]) -> Entries:
    """What is left of ``entries`` for other kinds of weights."""
    parts = {key for packed in found.values() for key in packed.keys}
    return {key: entry for key, entry in entries.items() if key not in parts}
