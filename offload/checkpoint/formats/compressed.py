"""compressed-tensors: Kimi K2 Thinking (int4 in groups of 32), FP8 with a scale for each row, and NVFP4.

``pack-quantized``: ``X.weight_packed``, int32 [outputs, inputs * bits / 32], holds codes that are 2^(bits - 1) above
their value, the first in the lowest bits; ``X.weight_scale`` [outputs, groups] has a scale for each group of inputs.
Asymmetric ones also have ``X.weight_zero_point``, packed along the outputs, those with reordered groups
``X.weight_g_idx``. A weight is (code - zero) * scale, rounded to the scales' dtype. ``float-quantized``: as
``fp8.py``, with ``X.weight_scale``. ``nvfp4-pack-quantized``: ``nvfp4.py``. Source: the compressed-tensors repository
(``compressors``, ``lifecycle``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from offload.checkpoint.formats.fp8 import Fp8Method
from offload.checkpoint.formats.method import ANOTHER, Method, Read
from offload.checkpoint.formats.nvfp4 import Nvfp4Layout, find_nvfp4, without_parts
from offload.checkpoint.formats.packed import Entries, PackedLayout, PackedTensor, Part
from offload.checkpoint.formats.unpacking import unpack_columns, unpack_rows
from offload.errors import ModelError

_NVFP4 = "nvfp4-pack-quantized"
_FORMATS = ("pack-quantized", "float-quantized", "naive-quantized", _NVFP4)
_BITS = (4, 8)


@dataclass(frozen=True)
class CompressedLayout(PackedLayout):
    """``group`` inputs share a scale; ``zero`` and ``order`` are 1 if there are zero points, and an order of groups."""

    kind = "pack-quantized"

    bits: int
    group: int
    scale: str
    zero: int
    order: int

    @property
    def parts(self) -> tuple[Part, ...]:
        outputs, inputs = self.shape
        groups = math.ceil(inputs / self.group)
        found = [
            Part("weight", (outputs, inputs * self.bits // 32), torch.int32),
            Part("scale", (outputs, groups), getattr(torch, self.scale)),
        ]
        if self.zero:
            found.append(Part("zero", (math.ceil(outputs * self.bits / 32), groups), torch.int32))
        if self.order:
            found.append(Part("order", (inputs,), torch.int32))
        return tuple(found)

    def block(self, parts: tuple[torch.Tensor, ...], start: int, stop: int) -> torch.Tensor:
        weight, scale, *rest = parts
        values = unpack_columns(weight[start:stop], self.bits).float()
        scales = scale[start:stop].float()
        zeros = torch.full_like(scales, 2 ** (self.bits - 1))
        if self.zero:
            zeros = unpack_rows(rest[0], self.bits)[start:stop].float()
        if self.order:
            group_of = rest[-1].long()
            values = (values - zeros[:, group_of]) * scales[:, group_of]
        elif self.shape[1] % self.group == 0:
            groups = values.unflatten(1, (-1, self.group))
            groups.sub_(zeros[..., None]).mul_(scales[..., None])
        else:
            group_of = torch.arange(self.shape[1]) // self.group
            values = (values - zeros[:, group_of]) * scales[:, group_of]
        return values.to(scale.dtype)


class CompressedMethod(Method):
    name = "compressed-tensors"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        weights = [group.get("weights") or {} for group in (config.get("config_groups") or {}).values()]
        formats = {
            config.get("format"),
            *(group.get("format") for group in (config.get("config_groups") or {}).values()),
        }
        for name in sorted(formats - {None}):
            if name not in _FORMATS and name != "mixed-precision":
                raise ModelError(
                    f"the compressed-tensors format '{name}' is not supported; these are: {', '.join(_FORMATS)}; "
                    f"{ANOTHER}"
                )
        bits = {int(group.get("num_bits", 0)) for group in weights if group.get("type") == "int"}
        if len(bits) > 1 or not bits <= set(_BITS):
            raise ModelError(
                f"compressed-tensors weights of {', '.join(map(str, sorted(bits)))} bits are not supported; 4 or 8 "
                f"are, the same for all weights; {ANOTHER}"
            )
        self._bits = bits.pop() if bits else 0
        self._nvfp4 = _NVFP4 in formats
        self._weights: Mapping[str, Any] = weights[0] if weights else {}
        self._fp8 = Fp8Method({"weight_block_size": self._weights.get("block_structure")})

    def find(self, entries: Entries, read: Read) -> dict[str, PackedTensor]:
        found = find_nvfp4(entries, "_packed", "_global_scale", divides=1)
        entries = without_parts(entries, found)
        found |= self._fp8.find(entries, read)
        for key, entry in entries.items():
            name = key.removesuffix("_packed")
            if not key.endswith(".weight_packed"):
                continue
            scale, zero, order = (f"{name}_{part}" for part in ("scale", "zero_point", "g_idx"))
            if scale not in entries or not self._bits:
                raise ModelError(f"the packed tensor {key} has no scales ({scale}); download the checkpoint again")
            outputs, words = entry.shape
            inputs, groups = words * 32 // self._bits, entries[scale].shape[-1]
            if entries[scale].shape != (outputs, groups):
                raise ModelError(f"the scales {scale} {list(entries[scale].shape)} do not fit the weights {key}")
            group = _group_size(inputs, groups, self._weights.get("group_size"))
            dtype = str(entries[scale].dtype).removeprefix("torch.")
            layout = CompressedLayout(
                (outputs, inputs), self._bits, group, dtype, int(zero in entries), int(order in entries)
            )
            keys = [key, scale] + [part for part in (zero, order) if part in entries]
            found[name] = PackedTensor(layout, tuple(keys))
        return found

    def predict(self, shape: tuple[int, int], dtype: torch.dtype, transposed: bool) -> PackedLayout | None:
        if self._nvfp4 and not self._bits:
            return Nvfp4Layout(shape, 1)
        if not self._bits:
            return self._fp8.predict(shape, dtype, transposed)
        group = int(self._weights.get("group_size") or shape[1])
        symmetric = bool(self._weights.get("symmetric", True))
        return CompressedLayout(shape, self._bits, group, str(dtype).removeprefix("torch."), int(not symmetric), 0)


def _group_size(inputs: int, groups: int, said: int | None) -> int:
    """As the config says if that gives so many groups, else as even groups are."""
    if said and said > 0 and math.ceil(inputs / said) == groups:
        return said
    return math.ceil(inputs / groups)
