"""What stands in the skeleton for a linear layer or an embedding whose weights are quantised.

The weights are neither parameters nor buffers: transformers' loader would look for the first in the checkpoint and make
the second anew.
"""

from __future__ import annotations

import torch

from offload.compute.matrix import MatrixLayout, QuantizedMatrix, decode
from offload.compute.product import Products


class _Quantized(torch.nn.Module):
    """``dtype`` is the one that the weights would have in the native skeleton."""

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype, products: Products) -> None:
        super().__init__()
        self.matrix = matrix
        self.products = products
        self._stand_in = torch.empty(0, dtype=dtype)

    @property
    def weight(self) -> torch.Tensor:
        """Empty: model code asks it for dtype and device. Computing with it fails."""
        return self._stand_in

    def extra_repr(self) -> str:
        layout = self.matrix.layout
        return f"{layout.columns} -> {layout.rows}, {layout.bits} bits"


class QuantizedLinear(_Quantized):
    """``torch.nn.Linear``, of which ``bias`` stays an ordinary parameter."""

    def __init__(
        self, matrix: QuantizedMatrix, dtype: torch.dtype, products: Products, bias: torch.nn.Parameter | None = None
    ) -> None:
        super().__init__(matrix, dtype, products)
        self.in_features, self.out_features = matrix.layout.columns, matrix.layout.rows
        self.register_parameter("bias", bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] in float32, bfloat16 or float16 -> [..., out_features] in the same dtype."""
        states = input.reshape(-1, self.in_features)
        return self.products.linear(self.matrix, states, self.bias).view(*input.shape[:-1], self.out_features)


class QuantizedEmbedding(_Quantized):
    """``torch.nn.Embedding``; ``scale`` is what some families multiply its rows with."""

    def __init__(
        self, matrix: QuantizedMatrix, dtype: torch.dtype, products: Products, scale: float | None = None
    ) -> None:
        super().__init__(matrix, dtype, products)
        self.num_embeddings, self.embedding_dim = matrix.layout.rows, matrix.layout.columns
        self._scale = None if scale is None else torch.tensor(scale).to(dtype)  # rounded, as the families do

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Ids [...] -> [..., embedding_dim] in the weights' dtype; only these rows are decoded."""
        ids = input.reshape(-1)
        layout = self.matrix.layout
        rows = QuantizedMatrix(
            MatrixLayout(len(ids), layout.columns, layout.bits, layout.group),
            self.matrix.codes[ids],
            self.matrix.params[ids],
        )
        decoded = decode(rows, self._stand_in.dtype, self.products.kernels).view(*input.shape, self.embedding_dim)
        return decoded if self._scale is None else decoded * self._scale
