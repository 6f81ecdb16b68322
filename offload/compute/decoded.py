"""Packed weights: multiplied as they are with few tokens, else decoded into memory that all experts share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from offload.checkpoint.formats import Weights
from offload.checkpoint.formats.packed import PackedMatrix, PackedParameter
from offload.compute.kernels.published import FEW_TOKENS, PublishedKernels

DECODING_BYTES = 32 * 2**20
"""What decoding needs beside its result (measured: 7 to 24 MiB, most with Q6_K): a block of weights in float32, its
codes and indices."""


def decode_bytes(shapes: Iterable[tuple[int, ...]], itemsize: int) -> int:
    """Of the shared memory, and of decoding into it; ``shapes`` are those of the parameters of all experts."""
    return max((math.prod(shape) for shape in shapes), default=0) * itemsize + DECODING_BYTES


class Decoder:
    """For the engine thread only: a decoded parameter is good until the next is decoded.

    Without ``kernels``, and for what they do not know, torch decodes: the same bits.
    """

    def __init__(self, kernels: PublishedKernels | None = None) -> None:
        self._kernels = kernels
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def weights(self, weights: Weights, dtype: torch.dtype) -> DecodedWeights:
        """``weights`` of an expert, whose packed parameters are decoded to ``dtype`` whenever one is asked for."""
        return DecodedWeights(self, weights, dtype)

    def product(self, parameter: PackedParameter, states: torch.Tensor, inputs_first: bool) -> torch.Tensor | None:
        """``states`` [tokens, inputs] times all of ``parameter``, by the kernels; None: that is not for them.

        ``inputs_first``: the parameter is [inputs, outputs] in the model, else [outputs, inputs].
        """
        pieces = [piece for piece in parameter.pieces if isinstance(piece, PackedMatrix)]
        if self._kernels is None or len(states) > FEW_TOKENS or len(pieces) < len(parameter.pieces):
            return None
        if inputs_first and len(pieces) > 1:  # one below the other, they are inputs
            return None
        if not all(self._kernels.takes(piece, states.dtype, inputs_first) for piece in pieces):
            return None
        widths = [piece.layout.shape[int(inputs_first)] for piece in pieces]
        output = states.new_empty(len(states), sum(widths))
        states = states.contiguous()
        parts = zip(pieces, output.split(widths, dim=1), strict=True)
        return output if all(self._kernels.linear(piece, states, part) for piece, part in parts) else None

    def decode(self, parameter: PackedParameter, dtype: torch.dtype) -> torch.Tensor:
        size, device = math.prod(parameter.shape) * dtype.itemsize, parameter.device
        if len(self._buffer) < size or self._buffer.device != device:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # first let go of the old
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        return parameter.decode(self._buffer[:size].view(dtype).view(parameter.shape), self._matrix)

    def _matrix(self, matrix: PackedMatrix, out: torch.Tensor) -> None:
        if self._kernels is None or not self._kernels.decode(matrix, out):
            matrix.layout.decode(matrix.parts, out)


class DecodedWeights(Mapping[str, torch.Tensor]):
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

    def product(self, name: str, states: torch.Tensor, inputs_first: bool) -> torch.Tensor | None:
        """As :meth:`Decoder.product`; None also for a parameter that is not packed."""
        weight = self._weights[name]
        return self._decoder.product(weight, states, inputs_first) if isinstance(weight, PackedParameter) else None

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
