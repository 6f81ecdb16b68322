"""GGUF: llama.cpp's blocks. A row is a number of blocks, each with the codes and the scales of 32 or 256 weights.

Source: llama.cpp (``ggml/src/ggml-common.h`` and ``ggml-quants.c``, the ``dequantize_row_*``); decoded values are those
of the ``gguf`` package, float32 before they are rounded to the model's dtype. The kinds that are most in use are
decoded here with torch, the rest (IQ1 to IQ3, TQ) by that package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from offload.checkpoint.formats.packed import PackedLayout, Part

BLOCKS = {  # ggml's number -> name, weights of a block, bytes of a block
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}  # fmt: skip
_SIZES = {name: (weights, size) for name, weights, size in BLOCKS.values()}
_NUMBERS = {name: number for number, (name, _, _) in BLOCKS.items()}
_IQ4 = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32)
_FP4 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.float32)


@dataclass(frozen=True)
class GgufLayout(PackedLayout):
    """``type`` is ggml's name of the blocks."""

    kind = "gguf"

    type: str

    @property
    def parts(self) -> tuple[Part, ...]:
        weights, size = _SIZES[self.type]
        return (Part("blocks", (self.shape[0], self.shape[1] // weights * size), torch.uint8),)

    def block(self, parts: tuple[torch.Tensor, ...], start: int, stop: int) -> torch.Tensor:
        blocks = parts[0][start:stop].reshape(-1, _SIZES[self.type][1])
        return _DECODERS.get(self.type, _by_package(self.type))(blocks).reshape(stop - start, -1)


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """A float16 of each block, [n, 1] in float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(data: torch.Tensor, width: int) -> torch.Tensor:
    """Of each ``width`` bytes first the low halves, then the high ones: uint8 [n, m] -> [n, 2 m / width, width]."""
    data = data.reshape(len(data), -1, width)
    return torch.stack([data & 15, data >> 4], 2).reshape(len(data), -1, width)


def _fields(data: torch.Tensor, bits: int, count: int, width: int) -> torch.Tensor:
    """``count`` fields of a byte, the lowest of ``width`` bytes first: uint8 [n, m] -> [n, count m / width, width]."""
    shifts = torch.arange(0, bits * count, bits, dtype=torch.uint8).view(1, 1, -1, 1)
    return ((data.reshape(len(data), -1, 1, width) >> shifts) & (2**bits - 1)).reshape(len(data), -1, width)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:], 16).flatten(1).float() - 8)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:], 16).flatten(1).float() + _half(blocks, 2)


def _fifth_bits(data: torch.Tensor) -> torch.Tensor:
    """Bit i of 32 belongs to weight i: uint8 [n, 4] -> [n, 32], 0 or 16."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (((data[:, :, None] >> shifts) & 1) << 4).flatten(1)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, 6:], 16).flatten(1) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks, 0) * (codes.float() - 16)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, 8:], 16).flatten(1) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    scales = blocks[:, :16]
    scale = (_half(blocks, 80) * (scales & 15).float())[..., None]
    low = (_half(blocks, 82) * (scales >> 4).float())[..., None]
    codes = _fields(blocks[:, 16:80], 2, 4, 32).reshape(len(blocks), 16, 16)
    return scale * codes.float() - low


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    low = torch.cat([low & 15, low >> 4], 1)
    high = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    scale = _half(blocks, 108) * ((low | (high << 4)).float() - 32)
    codes = _fields(blocks[:, 32:96], 2, 4, 32).reshape(len(blocks), 16, 16).float()
    third = _fields(blocks[:, :32], 1, 8, 32).reshape(len(blocks), 16, 16).float()
    return scale[..., None] * (codes - 4 * (1 - third))


def _six_bits(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima of the eight groups of Q4_K and Q5_K: uint8 [n, 12] -> two of [n, 8], float32."""
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], 1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], 1)
    return scales.float(), minima.float()


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = _six_bits(blocks[:, 4:16])
    scale, low = (_half(blocks, 0) * scales)[..., None], (_half(blocks, 2) * minima)[..., None]
    return scale * _nibbles(blocks[:, 16:], 32).float() - low


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = _six_bits(blocks[:, 4:16])
    scale, low = (_half(blocks, 0) * scales)[..., None], (_half(blocks, 2) * minima)[..., None]
    codes = _nibbles(blocks[:, 48:], 32) | (_fields(blocks[:, 16:48], 1, 8, 32) << 4)
    return scale * codes.float() - low


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    codes = _nibbles(blocks[:, :128], 64).reshape(len(blocks), -1, 32) | (_fields(blocks[:, 128:192], 2, 4, 32) << 4)
    return (_half(blocks, 208) * scales)[..., None] * (codes.float() - 32).reshape(len(blocks), 16, 16)


def _iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * _IQ4.to(blocks.device)[_nibbles(blocks[:, 2:], 16).flatten(1).int()]


def _iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    high = blocks[:, 2:4].contiguous().view(torch.int16).int()
    high = (high >> torch.arange(0, 16, 2)) & 3
    low = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], 2).flatten(1)
    scale = _half(blocks, 0) * ((low | (high << 4)).float() - 32)
    return scale[..., None] * _IQ4.to(blocks.device)[_nibbles(blocks[:, 8:], 16).reshape(len(blocks), 8, 32).int()]


def _mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    return (blocks[:, :1].float() - 128).exp2() * _FP4.to(blocks.device)[_nibbles(blocks[:, 1:], 16).flatten(1).int()]


def _by_package(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def decode(blocks: torch.Tensor) -> torch.Tensor:
        from gguf import GGMLQuantizationType, dequantize

        return torch.from_numpy(dequantize(blocks.cpu().numpy(), GGMLQuantizationType(_NUMBERS[name]))).to(
            blocks.device
        )

    return decode


_DECODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip
