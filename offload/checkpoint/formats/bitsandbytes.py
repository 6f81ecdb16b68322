"""bitsandbytes: NF4 and FP4, codes of 4 bits that pick one of 16 values, with a scale for each block of weights.

``X.weight`` is uint8 with two codes a byte, the first in its high half, the matrix's rows one after the other. Beside
it stand ``X.weight.absmax``, the scale of each ``blocksize`` weights, ``X.weight.quant_map``, the 16 values, and
``X.weight.quant_state.bitsandbytes__nf4``, a JSON text with ``shape`` and ``blocksize``. With double quantisation
``absmax`` has codes of 8 bits: the scale is ``nested_quant_map[code] * nested_absmax[code's block] + nested_offset``. A
weight is the product of value and scale in float32, rounded to the model's dtype. Source: bitsandbytes
(``functional.py``, ``QuantState``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from offload.checkpoint.formats.gptq import check_parts
from offload.checkpoint.formats.method import Method, Read
from offload.checkpoint.formats.packed import Entries, PackedLayout, PackedTensor, Part
from offload.errors import ModelError

_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class BitsAndBytesLayout(PackedLayout):
    """``nested`` is the block size of the scales' scales, 0 without."""

    kind = "bnb4"

    blocksize: int
    nested: int

    @property
    def parts(self) -> tuple[Part, ...]:
        weights = math.prod(self.shape)
        blocks = math.ceil(weights / self.blocksize)
        found = [
            Part("weight", (math.ceil(weights / 2),), torch.uint8),
            Part("absmax", (blocks,), torch.uint8 if self.nested else torch.float32),
            Part("values", (16,), torch.float32),
        ]
        if self.nested:
            found.append(Part("nested_absmax", (math.ceil(blocks / self.nested),), torch.float32))
            found.append(Part("nested_values", (256,), torch.float32))
            found.append(Part("nested_offset", (1,), torch.float32))
        return tuple(found)

    def block(self, parts: tuple[torch.Tensor, ...], start: int, stop: int) -> torch.Tensor:
        weight, absmax, values, *nested = parts
        columns = self.shape[1]
        first, last = start * columns, stop * columns
        data = weight[first // 2 : math.ceil(last / 2)].int()
        pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], -1)
        found = pairs.index_select(0, data).view(-1)[first % 2 :][: last - first]
        blocks = slice(first // self.blocksize, math.ceil(last / self.blocksize))
        scales = absmax[blocks]
        if nested:
            of_block = torch.arange(blocks.start, blocks.stop) // self.nested
            scales = nested[1][scales.int()] * nested[0][of_block] + nested[2]
        if first % self.blocksize or last % self.blocksize:
            scales = scales[torch.arange(first, last) // self.blocksize - blocks.start]
            found = found * scales
        else:
            found.view(-1, self.blocksize).mul_(scales[:, None])
        return found.view(stop - start, columns)


class BitsAndBytesMethod(Method):
    name = "bitsandbytes"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        if not config.get("load_in_4bit"):
            raise ModelError(
                "bitsandbytes weights of 8 bits are not supported; those of 4 bits (nf4) are, or use an unquantised "
                "checkpoint of this model with --format int8"
            )

    def find(self, entries: Entries, read: Read) -> dict[str, PackedTensor]:
        found = {}
        for key in entries:
            name, _, kind = key.partition(_STATE)
            if not kind:
                continue
            try:
                state = json.loads(bytes(read(key).tolist()))
                rows, columns = (int(size) for size in state["shape"])
                nested = int(state.get("nested_blocksize") or 0)
                offset = (float(state["nested_offset"]),) if nested else ()
                layout = BitsAndBytesLayout((rows, columns), int(state["blocksize"]), nested)
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(f"the tensor {key} is damaged ({error}); download the checkpoint again") from error
            keys = [name, f"{name}.absmax", f"{name}.quant_map"]
            keys += [f"{name}.nested_absmax", f"{name}.nested_quant_map"] if nested else []
            check_parts(key, tuple(keys), entries)
            for part, there in zip(layout.parts, keys, strict=False):
                if math.prod(entries[there].shape) != math.prod(part.shape) or entries[there].dtype != part.dtype:
                    raise ModelError(f"the tensor {there} {list(entries[there].shape)} does not fit the weights {name}")
            found[name] = PackedTensor(layout, tuple(keys), None, offset)
        return found

    def predict(self, shape: tuple[int, int], dtype: torch.dtype, transposed: bool) -> PackedLayout | None:
        nested = 256 if self.config.get("bnb_4bit_use_double_quant") else 0
        return BitsAndBytesLayout(shape, 64, nested)
