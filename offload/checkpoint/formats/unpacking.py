"""Small whole numbers out of 32-bit words."""

from __future__ import annotations

import torch


def unpack_columns(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, n] -> uint8 [rows, n * 32 / bits]: the lowest bits of a word are its first column."""
    data = words.contiguous().view(torch.uint8)
    if bits == 8:
        return data
    return torch.stack([data & 15, data >> 4], -1).view(len(words), -1)


def unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n, columns] -> uint8 [n * 32 / bits, columns]: the lowest bits of a word are its first row."""
    data = words.contiguous().view(torch.uint8).view(len(words), -1, 4).transpose(1, 2)  # [n, byte, columns]
    if bits == 4:
        data = torch.stack([data & 15, data >> 4], 2)
    return data.reshape(len(words) * 32 // bits, -1)
