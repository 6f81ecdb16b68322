"""The modules that stand for linear layers and embeddings with quantised weights."""

from __future__ import annotations

import pytest
import torch

from offload.compute.dense import QuantizedEmbedding, QuantizedLinear
from offload.compute.kernels import load_kernels
from offload.compute.matrix import MatrixLayout, QuantizedMatrix, decode, empty_matrix, encode
from offload.compute.product import Products

FEW = 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantized(rows: int, columns: int, bits: int) -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(rows + columns)
    matrix = empty_matrix(MatrixLayout.make(rows, columns, bits))
    encode(torch.randn(rows, columns, generator=generator), matrix, load_kernels())
    return matrix


def products(with_kernels: bool) -> Products:
    return Products(load_kernels() if with_kernels else None, FEW)


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96), (3, 96), (2, 7, 96), (2, 3, 2, 96), (0, 96), (2, 0, 96)])
def test_linear(shape: tuple[int, ...], dtype: torch.dtype, bits: int, with_kernels: bool) -> None:
    matrix = quantized(40, 96, bits)
    bias = torch.nn.Parameter(torch.randn(40).to(dtype), requires_grad=False)
    inputs = torch.randn(shape).to(dtype)
    weights = decode(matrix, torch.float32, None)
    for ours in (None, bias):
        output = QuantizedLinear(matrix, dtype, products(with_kernels), ours)(inputs)
        expected = torch.nn.functional.linear(inputs.float(), weights, None if ours is None else ours.float())
        assert (output.dtype, output.shape) == (dtype, (*shape[:-1], 40))
        tolerance = 1e-4 if dtype is torch.float32 else 0.03
        torch.testing.assert_close(output.float(), expected, atol=tolerance * 10, rtol=tolerance)


def test_linear_takes_any_strides() -> None:
    linear = QuantizedLinear(quantized(40, 96, 4), torch.float32, products(True))
    prompt = torch.randn(1, 9, 96)
    torch.testing.assert_close(linear(prompt[:, -1:]), linear(prompt)[:, -1:])
    torch.testing.assert_close(linear(prompt.transpose(1, 2).contiguous().transpose(1, 2)), linear(prompt))


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 6), (1, 1), (0,)])
def test_embedding(shape: tuple[int, ...], dtype: torch.dtype, bits: int, with_kernels: bool) -> None:
    matrix = quantized(50, 70, bits)  # the columns are no multiple of a group
    ids = torch.randint(0, 50, shape)
    rows = QuantizedEmbedding(matrix, dtype, products(with_kernels))(ids)
    assert (rows.dtype, rows.shape) == (dtype, (*shape, 70))
    assert torch.equal(rows, decode(matrix, dtype, load_kernels() if with_kernels else None)[ids])


def test_embedding_with_a_scale() -> None:
    """As Gemma's: the factor is rounded to the dtype of the rows."""
    matrix, ids = quantized(50, 64, 8), torch.tensor([3, 4])
    plain = QuantizedEmbedding(matrix, torch.bfloat16, products(True))(ids)
    scaled = QuantizedEmbedding(matrix, torch.bfloat16, products(True), scale=53.0660)(ids)
    assert torch.equal(scaled, plain * torch.tensor(53.0660, dtype=torch.bfloat16))


def test_only_the_rows_that_are_asked_for_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(matrix: QuantizedMatrix, *rest: object) -> torch.Tensor:
        seen.append(matrix.layout.rows)
        return decode(matrix, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("offload.compute.dense.decode", watched)
    QuantizedEmbedding(quantized(50, 64, 4), torch.float32, products(True))(torch.tensor([[1, 2, 3]]))
    assert seen == [3]


def test_what_model_code_may_ask() -> None:
    linear = QuantizedLinear(quantized(40, 96, 4), torch.bfloat16, products(True))
    embedding = QuantizedEmbedding(quantized(50, 64, 8), torch.float32, products(True))
    assert (linear.in_features, linear.out_features, linear.bias) == (96, 40, None)
    assert (embedding.num_embeddings, embedding.embedding_dim) == (50, 64)
    assert (linear.weight.dtype, embedding.weight.dtype) == (torch.bfloat16, torch.float32)
    assert linear.weight.device == torch.device("cpu")
    assert "96 -> 40, 4 bits" in repr(linear)
    with pytest.raises(RuntimeError):  # never a wrong result
        torch.nn.functional.linear(torch.ones(1, 96, dtype=torch.bfloat16), linear.weight)
    with pytest.raises(RuntimeError):
        linear.weight @ torch.ones(96, dtype=torch.bfloat16)


def test_weights_are_hidden_from_the_loader() -> None:
    bias = torch.nn.Parameter(torch.zeros(40))
    linear = QuantizedLinear(quantized(40, 96, 4), torch.float32, products(True), bias)
    embedding = QuantizedEmbedding(quantized(50, 64, 4), torch.float32, products(True), scale=2.0)
    assert list(linear.state_dict()) == ["bias"]
    assert not embedding.state_dict() and not list(embedding.buffers())
