"""Products with quantised matrices: a compiled kernel for few tokens, another one or decode and multiply for many.

With few tokens, reading the weights is what takes the time; with many, arithmetic is. Where the processor has integer
dot products, a kernel for many tokens makes integers of them, too; elsewhere the weights are decoded for the library's
product of full matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from offload.compute.kernels import Kernels
from offload.compute.matrix import MatrixLayout, QuantizedMatrix, decode

DEFAULT_FEW_TOKENS = 16
"""Where nothing was measured."""

DECODE_BYTES = 16 * 2**20
"""Of the buffer that weights are decoded into, reused for all products of an engine; larger matrices go in parts. The
kernel for many tokens makes its copy of the input no larger: more tokens go in parts.
"""


class Products:
    """Multiplies where its inputs are; the kernels are for the CPU.

    ``few_tokens`` is the most that go through the kernel, one number or one for each number of bits: decided once per
    machine (``calibration.py``).

    For the engine thread only: the decode buffer and the kernels' scratch memory are shared by all products.
    """

    def __init__(self, kernels: Kernels | None, few_tokens: int | Mapping[int, int] = DEFAULT_FEW_TOKENS) -> None:
        self.kernels = kernels
        self._few = {4: few_tokens, 8: few_tokens} if isinstance(few_tokens, int) else dict(few_tokens)
        self.always_few = 0 if kernels is None else min(self._few.values())
        """Tokens that go through the kernel whatever the layout."""
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def few_tokens(self, *layouts: MatrixLayout) -> int:
        """The most tokens of matrices of these layouts for the kernel for few; 0 without the kernels."""
        return 0 if self.kernels is None else min(self._few[layout.bits] for layout in layouts)

    def linear(self, matrix: QuantizedMatrix, inputs: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``inputs`` [tokens, columns] in the model's dtype -> [tokens, rows] in the same dtype."""
        if self.kernels is None or (len(inputs) > self.always_few and len(inputs) > self.few_tokens(matrix.layout)):
            return self.many_linear(matrix, inputs, bias)
        exact = inputs.dtype not in (torch.float32, torch.bfloat16)
        inputs = (inputs.float() if exact else inputs).contiguous()
        output = torch.empty(len(inputs), matrix.layout.rows, dtype=inputs.dtype)
        job = (matrix.codes.data_ptr(), matrix.params.data_ptr(), 0, len(inputs))
        self.kernels.linear(matrix.layout.shape, [job], inputs, output)
        output = output.half() if exact else output
        return output if bias is None else output + bias

    def takes_wide(self, dtype: torch.dtype) -> bool:
        """Whether there is a kernel for many tokens that takes inputs of ``dtype``."""
        return self.kernels is not None and self.kernels.integer_dot and dtype == torch.bfloat16

    def many_linear(
        self, matrix: QuantizedMatrix, inputs: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As :meth:`linear`, for many tokens."""
        if not self.takes_wide(inputs.dtype):
            return self.decoded_linear(matrix, inputs, bias)
        assert self.kernels is not None
        inputs = inputs.contiguous()
        output = self.kernels.states.empty((len(inputs), matrix.layout.rows), inputs.dtype)
        step = wide_rows(panel_bytes(matrix.layout))
        for first in range(0, len(inputs), step):
            job = (matrix.codes.data_ptr(), matrix.params.data_ptr(), first, min(step, len(inputs) - first))
            self.kernels.wide_linear(matrix.layout.shape, [job], inputs, output)
        return output if bias is None else output + bias

    def decoded_linear(
        self, matrix: QuantizedMatrix, inputs: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same by decoding the weights, a part of the rows at a time."""
        layout = matrix.layout
        output = torch.empty(len(inputs), layout.rows, dtype=inputs.dtype, device=inputs.device)
        step = max(16, DECODE_BYTES // (layout.columns * inputs.element_size()) // 16 * 16)
        for start in range(0, layout.rows, step):
            rows = slice(start, min(start + step, layout.rows))
            part = _rows(matrix, rows)
            weights = decode(part, inputs.dtype, self.kernels, self._decode_buffer(part, inputs.dtype))
            output[:, rows] = torch.nn.functional.linear(inputs, weights, None if bias is None else bias[rows])
        return output

    def _decode_buffer(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> torch.Tensor:
        layout = matrix.layout
        size = layout.rows * layout.columns * dtype.itemsize
        device = matrix.codes.device
        if self._buffer.numel() < size or self._buffer.device != device:
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        return self._buffer[:size].view(dtype).view(layout.rows, layout.columns)


def panel_bytes(layout: MatrixLayout) -> int:
    """What one row of the input takes, made ready for the kernel for many tokens (``kernels/wide.c``)."""
    group, planes = (layout.group, 1) if layout.bits == 4 else (64, 2)
    return math.ceil(layout.columns / group) * (group * planes + 12)


def wide_rows(row_bytes: int) -> int:
    """Rows of the input that one call of the kernel for many tokens takes, where each takes ``row_bytes``."""
    return max(1, DECODE_BYTES // row_bytes)


def _rows(matrix: QuantizedMatrix, rows: slice) -> QuantizedMatrix:
    layout = matrix.layout
    if rows.start == 0 and rows.stop == layout.rows:
        return matrix
    part = type(layout)(rows.stop - rows.start, layout.columns, layout.bits, layout.group)
    return QuantizedMatrix(part, matrix.codes[rows], matrix.params[rows])
