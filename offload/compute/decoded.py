"""Packed weights decoded where they are asked for, into memory that all experts share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from offload.checkpoint.formats import Weights
from offload.checkpoint.formats.packed import PackedMatrix, PackedParameter
from offload.compute.kernels.published import Decoders

DECODING_BYTES = 32 * 2**20
"""What decoding needs beside its result (measured: 7 to 24 MiB, most with Q6_K): a block of weights in float32, its
codes and indices."""


def decode_bytes(shapes: Iterable[tuple[int, ...]], itemsize: int) -> int:
    """Of the shared memory, and of decoding into it; ``shapes`` are those of the parameters of all experts."""
    return max((math.prod(shape) for shape in shapes), default=0) * itemsize + DECODING_BYTES


class Decoder:
    """For the engine thread only: a decoded parameter is good until the next is decoded.

    ``decoders`` are the compiled ones; without them, and for what they do not know, torch decodes: the same bits.
    """

    def __init__(self, decoders: Decoders | None = None) -> None:
        self._decoders = decoders
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def weights(self, weights: Weights, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
        """``weights`` of an expert, whose packed parameters are decoded to ``dtype`` whenever one is asked for."""
        return _Decoded(self, weights, dtype)

    def decode(self, parameter: PackedParameter, dtype: torch.dtype) -> torch.Tensor:
        size, device = math.prod(parameter.shape) * dtype.itemsize, parameter.device
        if len(self._buffer) < size or self._buffer.device != device:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # first let go of the old
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        return parameter.decode(self._buffer[:size].view(dtype).view(parameter.shape), self._matrix)

    def _matrix(self, matrix: PackedMatrix, out: torch.Tensor) -> None:
        if self._decoders is None or not self._decoders.decode(matrix, out):
            matrix.layout.decode(matrix.parts, out)


class _Decoded(Mapping[str, torch.Tensor]):
    def __init__(self, decoder: Decoder, weights: Weights, dtype: torch.dtype) -> None:
        self._decoder = decoder
        self._weights = weights
        self._dtype = dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._weights[name]
        if isinstance(weight, PackedParameter):
            return self._decoder.decode(weight, self._dtype)
        assert isinstance(weight, torch.Tensor)
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
