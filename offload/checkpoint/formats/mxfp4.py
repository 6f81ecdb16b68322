"""MXFP4: gpt-oss, and the experts of FP8 checkpoints that hold them in 4 bits (DeepSeek-V4).

32 weights share an exponent of two (one byte, 127 above its value; 255 is no number); a weight is a float of 4 bits, a
sign and 0, 0.5, 1, 1.5, 2, 3, 4 or 6. A byte holds two, the first in its low half. gpt-oss has ``X_blocks``, uint8
[experts, outputs, inputs / 32, 16], and ``X_scales`` [experts, outputs, inputs / 32]; the model has the transpose.
Source: the OCP Microscaling Formats specification 1.0 and the weights' description in the gpt-oss repository.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offload.checkpoint.formats.method import Method, Read
from offload.checkpoint.formats.packed import Entries, PackedLayout, PackedTensor, Part
from offload.errors import ModelError

GROUP = 32
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_POSITIVE, *(-value for value in _POSITIVE)])
PAIRS = torch.stack([_VALUES.repeat(16), _VALUES.repeat_interleave(16)], -1)
"""The two weights of each byte, [256, 2]."""


@dataclass(frozen=True)
class Mxfp4Layout(PackedLayout):
    """``inputs_first`` is 1 if the model has the matrix as [inputs, outputs], else 0."""

    kind = "mxfp4"

    inputs_first: int

    @property
    def transposed(self) -> bool:
        return bool(self.inputs_first)

    @property
    def parts(self) -> tuple[Part, ...]:
        outputs, inputs = reversed(self.shape) if self.transposed else self.shape
        return (
            Part("blocks", (outputs, inputs // 2), torch.uint8),
            Part("scale", (outputs, inputs // GROUP), torch.uint8),
        )

    def block(self, parts: tuple[torch.Tensor, ...], start: int, stop: int) -> torch.Tensor:
        blocks, scales = (part[start:stop] for part in parts)
        values = PAIRS.to(blocks.device).index_select(0, blocks.reshape(-1).int()).view(*scales.shape, GROUP)
        values *= (scales.float() - 127).exp2()[..., None]
        return values.view(len(blocks), -1)

    def finite(self, parts: tuple[torch.Tensor, ...]) -> bool:
        return not bool((parts[1] == 255).any())


class Mxfp4Method(Method):
    name = "mxfp4"

    def find(self, entries: Entries, read: Read) -> dict[str, PackedTensor]:
        found = {}
        for key, entry in entries.items():
            name = key.removesuffix("_blocks")
            if name == key:
                continue
            scales = f"{name}_scales"
            if scales not in entries:
                raise ModelError(f"the MXFP4 tensor {key} has no scales ({scales}); download the checkpoint again")
            if entries[scales].shape != entry.shape[:-1] or entry.shape[-1] != GROUP // 2 or len(entry.shape) != 4:
                shapes = f"{list(entries[scales].shape)} do not fit the weights {key} {list(entry.shape)}"
                raise ModelError(f"the scales {scales} {shapes}")
            experts, outputs, groups, _ = entry.shape
            layout = Mxfp4Layout((groups * GROUP, outputs), 1)
            found[name] = PackedTensor(layout, (key, scales), experts)
        return found

    def predict(self, shape: tuple[int, int], dtype: torch.dtype, transposed: bool) -> PackedLayout | None:
        return Mxfp4Layout(shape, int(transposed))
