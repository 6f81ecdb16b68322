"""FP8 with scales for blocks: DeepSeek-V3 and R1, Qwen3-FP8, MiniMax-M2 and others.

``X.weight`` holds 8-bit floats and ``X.weight_scale_inv`` a scale for each block of, mostly, 128 x 128 weights; the
last blocks of a row or column may be smaller. A weight is the product of the two in float32, rounded to the model's
dtype. Source: the DeepSeek-V3 repository's inference code (``kernel.py``, ``weight_dequant``) and transformers'
``Fp8Dequantize``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from offload.checkpoint.formats.method import Method, Read
from offload.checkpoint.formats.mxfp4 import GROUP, Mxfp4Layout
from offload.checkpoint.formats.packed import Entries, PackedLayout, PackedTensor, Part
from offload.errors import ModelError

_WEIGHTS = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)


@dataclass(frozen=True)
class Fp8Layout(PackedLayout):
    """``scale`` and ``weight`` name dtypes; scales of uint8 are exponents of two, 127 above their value."""

    kind = "fp8"

    block_rows: int
    block_columns: int
    weight: str
    scale: str

    @property
    def grid(self) -> tuple[int, int]:
        """Number of blocks along rows and columns."""
        return math.ceil(self.shape[0] / self.block_rows), math.ceil(self.shape[1] / self.block_columns)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (
            Part("weight", self.shape, getattr(torch, self.weight)),
            Part("scale", self.grid, getattr(torch, self.scale)),
        )

    def block(self, parts: tuple[torch.Tensor, ...], start: int, stop: int) -> torch.Tensor:
        weight, scale = parts
        values = weight[start:stop].float()
        scales = scale_values(scale[start // self.block_rows : (stop - 1) // self.block_rows + 1])
        rows = torch.arange(start, stop) // self.block_rows - start // self.block_rows
        whole = self.shape[1] // self.block_columns * self.block_columns
        of_row = scales[rows]
        blocks = values[:, :whole].unflatten(1, (-1, self.block_columns))
        blocks *= of_row[:, : blocks.shape[1], None]
        if whole < self.shape[1]:
            values[:, whole:] *= of_row[:, -1:]
        return values


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """In float32."""
    return (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()


class Fp8Method(Method):
    name = "fp8"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        block = config.get("weight_block_size")
        self._block: tuple[int, int] | None = None if not block else (int(block[0]), int(block[1]))

    def find(self, entries: Entries, read: Read) -> dict[str, PackedTensor]:
        found = {}
        for key, entry in entries.items():
            if entry.dtype is torch.int8 and (packed := _four_bits(key, entries)):
                found[key] = packed
            if entry.dtype not in _WEIGHTS:
                continue
            stem = key.removesuffix(".weight")
            names = (f"{key}_scale_inv", f"{stem}.scale", f"{stem}.qscale_weight", f"{key}_scale")
            scale = next((name for name in names if name in entries), None)
            if scale is None:
                raise ModelError(f"the FP8 tensor {key} has no scales ({names[0]}); download the checkpoint again")
            *stack, rows, columns = entry.shape
            dtype = entries[scale].dtype
            if dtype not in _SCALES or len(stack) > 1:
                raise ModelError(f"the scales {scale} have the dtype {dtype}, which is not supported in FP8")
            grid = _grid(entries[scale].shape, len(stack))
            block = _block_size((rows, columns), grid, self._block)
            if block is None:
                raise ModelError(f"the scales {scale} {list(grid)} do not fit the weights {key} {list(entry.shape)}")
            layout = Fp8Layout((rows, columns), *block, _name(entry.dtype), _name(dtype))
            found[key] = PackedTensor(layout, (key, scale), stack[0] if stack else None)
        return found

    def predict(self, shape: tuple[int, int], dtype: torch.dtype, transposed: bool) -> PackedLayout | None:
        block = self._block or shape
        return Fp8Layout(shape, *block, "float8_e4m3fn", "float32")


def _four_bits(key: str, entries: Entries) -> PackedTensor | None:
    """Experts that are held in MXFP4: int8 [outputs, inputs / 2] with a scale for 32 inputs."""
    scale = f"{key.removesuffix('.weight')}.scale"
    (*stack, outputs, half), there = entries[key].shape, entries.get(scale)
    if len(stack) or there is None or there.shape != (outputs, 2 * half // GROUP):
        return None
    return PackedTensor(Mxfp4Layout((outputs, 2 * half), 0), (key, scale))


def _grid(shape: tuple[int, ...], stacked: int) -> tuple[int, ...]:
    """Of one matrix; a scale for the whole matrix may have no dimensions, a scale for each row only one."""
    shape = shape[stacked:]
    return (*shape, *(1,) * (2 - len(shape)))


def _block_size(shape: tuple[int, int], grid: tuple[int, ...], said: tuple[int, int] | None) -> tuple[int, int] | None:
    """As the config says, if the number of scales agrees; else as even blocks give; None if neither fits."""
    if said is not None and grid == tuple(math.ceil(n / b) for n, b in zip(shape, said, strict=True)):
        return said
    if len(grid) != 2 or any(n % g for n, g in zip(shape, grid, strict=True)):
        return None
    return shape[0] // grid[0], shape[1] // grid[1]


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
