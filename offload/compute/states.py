"""Memory for the states that a pass over many tokens makes anew in each layer.

Freed blocks of a MiB or more go back to the system (``offload/memory/process.py``), so that each new one would be
cleared page by page, which takes longer than a norm. To let the allocator keep them was tried: its holes are a little
too small for the next aligned block, and 100 MiB of them stayed.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence

import torch

LEAST_BYTES = 2**20
"""Smaller ones the allocator has at hand."""
MOST_BYTES = 64 * 2**20


class States:
    """Tensors whose memory is used again when nobody holds them, nor a view of them. For the engine thread only."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        """``most_bytes`` are kept at most, in blocks of an eighth of it at most. The plan counts them as activations:
        there are never more than a pass holds at a time."""
        self._most = most_bytes
        self._blocks: dict[int, list[mmap.mmap]] = {}  # by size

    @property
    def bytes(self) -> int:
        """What is kept, in use or not."""
        return sum(size * len(blocks) for size, blocks in self._blocks.items())

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor on the CPU, at the beginning of a page."""
        size = math.prod(shape) * dtype.itemsize
        if not LEAST_BYTES <= size <= self._most // 8:
            return torch.empty(*shape, dtype=dtype)
        block = _unused(self._blocks.get(size, []))
        if block is None:
            if self.bytes + size > self._most:
                self.clear()
            block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._blocks.setdefault(size, []).append(block)
        return torch.frombuffer(block, dtype=dtype).view(*shape)

    def clear(self) -> None:
        """Give back what is not in use now, and the rest when nobody holds it any more."""
        self._blocks.clear()


def _unused(blocks: list[mmap.mmap]) -> mmap.mmap | None:
    """The first that no tensor holds."""
    for block in blocks:
        if sys.getrefcount(block) <= _REFERENCES:
            return block
    return None


def _references(blocks: list[mmap.mmap]) -> int:
    """How many references a block has that is in a list alone, seen as :func:`_unused` does."""
    for block in blocks:
        return sys.getrefcount(block)
    return 0


_REFERENCES = _references([mmap.mmap(-1, mmap.PAGESIZE)])
