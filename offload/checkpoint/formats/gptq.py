"""GPTQ: codes of 4 or 8 bits, with a group for each input.

``X.qweight``, int32 [inputs * bits / 32, outputs], holds the codes, packed along the inputs; ``X.scales`` [groups,
outputs]; ``X.qzeros``, int32 [groups, outputs * bits / 32], packed along the outputs, one less than the zero points
unless the config's ``checkpoint_format`` is ``gptq_v2``, or all of them are the middle of the codes (GPTQModel has
written such without saying so); ``X.g_idx`` has the group of each input, which with
``desc_act`` are in any order. A weight is (code - zero) * scale, rounded to the scales' dtype; the model has the
transpose. Source: AutoGPTQ and GPTQModel (``nn_modules/qlinear``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from offload.checkpoint.formats.method import ANOTHER, Method, Read
from offload.checkpoint.formats.packed import Entries, PackedLayout, PackedTensor, Part
from offload.checkpoint.formats.unpacking import unpack_columns, unpack_rows
from offload.errors import ModelError

_MIDDLE = {4: 0x88888888 - 2**32, 8: 0x80808080 - 2**32}
"""A word of zero points that are all the middle of the codes."""


@dataclass(frozen=True)
class GptqLayout(PackedLayout):
    """``less`` is what the stored zero points lack, ``order`` is 1 if there is a group for each input.

    ``shape`` is the model's, [outputs, inputs].
    """

    kind = "gptq"
    step = 8  # inputs in a word

    bits: int
    groups: int
    scale: str
    less: int
    order: int

    @property
    def transposed(self) -> bool:
        return True

    @property
    def parts(self) -> tuple[Part, ...]:
        outputs, inputs = self.shape
        found = [
            Part("weight", (inputs * self.bits // 32, outputs), torch.int32),
            Part("scale", (self.groups, outputs), getattr(torch, self.scale)),
            Part("zero", (self.groups, outputs * self.bits // 32), torch.int32),
        ]
        return (*found, Part("order", (inputs,), torch.int32)) if self.order else tuple(found)

    def block(self, parts: tuple[torch.Tensor, ...], start: int, stop: int) -> torch.Tensor:
        weight, scale, zero, *order = parts
        group = math.ceil(self.shape[1] / self.groups)
        of_input = order[0][start:stop].long() if order else torch.arange(start, stop) // group
        values = unpack_rows(weight[start * self.bits // 32 : stop * self.bits // 32], self.bits).float()
        zeros = unpack_columns(zero, self.bits)
        zeros = ((zeros + self.less) & (2**self.bits - 1)).float()  # by the field: 15 and 1 do not touch the next one
        return values.sub_(zeros[of_input]).mul_(scale.float()[of_input]).to(scale.dtype)


class GptqMethod(Method):
    name = "gptq"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._bits = int(config.get("bits", 4))
        if self._bits not in _MIDDLE:
            raise ModelError(f"GPTQ weights of {self._bits} bits are not supported; 4 or 8 are; {ANOTHER}")
        form = config.get("checkpoint_format") or "gptq"
        if form not in ("gptq", "gptq_v2"):
            raise ModelError(f"the GPTQ checkpoint_format '{form}' is not supported; gptq and gptq_v2 are; {ANOTHER}")
        self._less = int(form == "gptq")

    def find(self, entries: Entries, read: Read) -> dict[str, PackedTensor]:
        found: dict[str, PackedTensor] = {}
        less = self._less
        for key, entry in entries.items():
            stem = key.removesuffix(".qweight")
            if stem == key:
                continue
            scale, zero, order = (f"{stem}.{part}" for part in ("scales", "qzeros", "g_idx"))
            check_parts(key, (scale, zero), entries)
            if not found and less:  # one of them tells for all
                less = int(not bool((read(zero) == _MIDDLE[self._bits]).all()))
            words, outputs = entry.shape
            groups, dtype = entries[scale].shape[0], str(entries[scale].dtype).removeprefix("torch.")
            shape = outputs, words * 32 // self._bits
            layout = GptqLayout(shape, self._bits, groups, dtype, less, int(order in entries))
            keys = (key, scale, zero, order) if order in entries else (key, scale, zero)
            check_shapes(layout, keys, entries)
            found[f"{stem}.weight"] = PackedTensor(layout, keys)
        return found

    def predict(self, shape: tuple[int, int], dtype: torch.dtype, transposed: bool) -> PackedLayout | None:
        size = int(self.config.get("group_size", 128))
        groups = math.ceil(shape[1] / size) if size > 0 else 1
        return GptqLayout(shape, self._bits, groups, "float16", self._less, 1)


def check_parts(key: str, wanted: tuple[str, ...], entries: Entries) -> None:
    """Raises ModelError if a part of what ``key`` belongs to is missing."""
    for part in wanted:
        if part not in entries:
            raise ModelError(f"the packed tensor {key} has no {part}; download the checkpoint again")


def check_shapes(layout: PackedLayout, keys: tuple[str, ...], entries: Entries) -> None:
    """Raises ModelError if a part has another number of weights or dtype than the layout says."""
    for key, part in zip(keys, layout.parts, strict=True):
        there = entries[key]
        if math.prod(there.shape) != math.prod(part.shape) or there.dtype != part.dtype:
            raise ModelError(f"the tensor {key} {list(there.shape)} does not fit the weights {keys[0]}")
