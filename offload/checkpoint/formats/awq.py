"""AWQ: codes of 4 bits, with a scale and a zero point for each group of inputs.

``X.qweight``, int32 [inputs, outputs / 8], holds the codes, packed along the outputs: from its lowest bits on a word
has outputs 0, 2, 4, 6, 1, 3, 5, 7. ``X.qzeros`` [groups, outputs / 8] is packed in the same way, ``X.scales``
is [groups, outputs]. A weight is (code - zero) * scale, rounded to the scales' dtype; the model has the transpose.
Source: AutoAWQ (``utils/packing_utils.py``), version ``gemm``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from offload.checkpoint.formats.gptq import check_parts, check_shapes
from offload.checkpoint.formats.method import ANOTHER, Method, Read
from offload.checkpoint.formats.packed import Entries, PackedLayout, PackedTensor, Part
from offload.checkpoint.formats.unpacking import unpack_columns
from offload.errors import ModelError

_PLACE_OF = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
"""Where in a word each of its outputs stands."""


@dataclass(frozen=True)
class AwqLayout(PackedLayout):
    """``shape`` is the model's, [outputs, inputs]; ``group`` inputs share a scale."""

    kind = "awq"

    group: int
    scale: str

    @property
    def transposed(self) -> bool:
        return True

    @property
    def parts(self) -> tuple[Part, ...]:
        outputs, inputs = self.shape
        return (
            Part("weight", (inputs, outputs // 8), torch.int32),
            Part("scale", (inputs // self.group, outputs), getattr(torch, self.scale)),
            Part("zero", (inputs // self.group, outputs // 8), torch.int32),
        )

    def block(self, parts: tuple[torch.Tensor, ...], start: int, stop: int) -> torch.Tensor:
        weight, scale, zero = parts
        groups = torch.arange(start, stop) // self.group
        values = _outputs(weight[start:stop])
        return values.sub_(_outputs(zero)[groups]).mul_(scale.float()[groups]).to(scale.dtype)


def _outputs(words: torch.Tensor) -> torch.Tensor:
    codes = unpack_columns(words, 4).view(len(words), -1, 8)
    return codes[..., _PLACE_OF.to(words.device)].reshape(len(words), -1).float()


class AwqMethod(Method):
    name = "awq"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        bits, version = (
            int(config.get("bits") or config.get("w_bit") or 4),
            str(config.get("version") or "gemm").lower(),
        )
        if bits != 4 or version != "gemm":
            raise ModelError(
                f"AWQ weights of {bits} bits in version '{version}' are not supported; 4 bits in gemm are; {ANOTHER}"
            )

    def find(self, entries: Entries, read: Read) -> dict[str, PackedTensor]:
        found = {}
        for key, entry in entries.items():
            stem = key.removesuffix(".qweight")
            if stem == key:
                continue
            keys = (key, f"{stem}.scales", f"{stem}.qzeros")
            check_parts(key, keys[1:], entries)
            (inputs, words), groups = entry.shape, entries[keys[1]].shape[0]
            if inputs % groups:
                raise ModelError(f"the tensor {keys[1]} {list(entries[keys[1]].shape)} does not fit the weights {key}")
            dtype = str(entries[keys[1]].dtype).removeprefix("torch.")
            layout = AwqLayout((words * 8, inputs), inputs // groups, dtype)
            check_shapes(layout, keys, entries)
            found[f"{stem}.weight"] = PackedTensor(layout, keys)
        return found

    def predict(self, shape: tuple[int, int], dtype: torch.dtype, transposed: bool) -> PackedLayout | None:
        size = int(self.config.get("group_size") or self.config.get("q_group_size") or 128)
        return AwqLayout(shape, size if size > 0 else shape[1], "float16")
