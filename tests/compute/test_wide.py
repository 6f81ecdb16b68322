"""The kernels for many tokens, on processors that have them: products of the weights with the input as integers stand
for it, row by row."""

from __future__ import annotations

import pytest
import torch

from offload.compute.kernels import Kernels
from offload.compute.product import Products, panel_bytes, wide_rows
from offload.compute.quantized_experts import in_calls
from tests.compute.test_kernels import (
    LAYOUTS,
    address,
    as_integers,
    assert_close,
    gated,
    jobs_of,
    normal,
    quantized,
)

SHAPES = [(1, 32), (16, 64), (40, 160), (77, 256), (96, 480), (5, 77), (33, 100), (3, 1)]
BFLOAT = torch.bfloat16


@pytest.fixture
def wide(kernels: Kernels) -> Kernels:
    if not kernels.integer_dot:
        pytest.skip("this processor has no integer dot products")
    return kernels


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
def test_products_of_several_jobs(
    bits: int, group: int, shape: tuple[int, int], dtype: torch.dtype, wide: Kernels
) -> None:
    counts = (13, 1, 4, 12, 31, 8, 5, 6)
    made = [quantized(*shape, bits, group, seed=number) for number in range(len(counts))]
    matrices = [matrix for matrix, _ in made]
    inputs = normal(9, shape[1], dtype=BFLOAT)
    token_of = torch.randint(0, 9, (sum(counts) + 2,), dtype=torch.int32)
    output = torch.full((len(token_of), shape[0]), 7.0, dtype=dtype)
    jobs, expected, first = [], torch.full(output.shape, 7.0, dtype=torch.float64), 1  # row 0 and the last are no job's
    exact = as_integers(inputs, bits, matrices[0].layout.group or 64)  # narrow matrices have smaller groups
    for (matrix, weights), count in zip(made, counts, strict=True):
        jobs.append((*address(matrix), first, count))
        rows = slice(first, first + count)
        expected[rows] = exact[token_of[rows].long()] @ weights.t()
        first += count
    wide.wide_linear(matrices[0].layout.shape, jobs[::-1], inputs, output, token_of)
    assert (output[0] == 7).all()
    assert (output[-1] == 7).all()
    size = inputs.double().abs().max() * shape[1] ** 0.5 if shape[0] == 1 else None  # one sum may be small by chance
    assert_close(output, expected, (1e-5 if bits == 8 else 5e-4) if dtype is torch.float32 else 4e-3, size)


@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
def test_a_row_does_not_depend_on_the_others(bits: int, group: int, wide: Kernels) -> None:
    matrix, _ = quantized(77, 256, bits, group)
    inputs = normal(30, 256, dtype=BFLOAT)
    alone = torch.empty(30, 77)
    for token in range(30):
        job = (*address(matrix), 0, 1)
        wide.wide_linear(matrix.layout.shape, [job], inputs[token : token + 1], alone[token : token + 1])
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for count in (2, 5, 9, 12, 13, 30):
                output = torch.empty(count, 77)
                wide.wide_linear(matrix.layout.shape, [(*address(matrix), 0, count)], inputs[:count], output)
                assert torch.equal(output, alone[:count])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("up_bits", LAYOUTS)
@pytest.mark.parametrize("down_bits", [(8, 0), (4, 64)])
@pytest.mark.parametrize(("hidden", "inner"), [(160, 96), (77, 24), (100, 33), (64, 1)])
@pytest.mark.parametrize("tokens", [1, 12, 50])
def test_whole_experts(
    tokens: int, hidden: int, inner: int, down_bits: tuple[int, int], up_bits: tuple[int, int], wide: Kernels
) -> None:
    experts = [gated(hidden, inner, up_bits, down_bits, seed) for seed in range(3)]
    inputs = normal(tokens, hidden, dtype=BFLOAT) / hidden**0.5
    jobs, token_of, output, _ = jobs_of(experts, inputs)
    wide.wide_experts(experts[0].expert, jobs, inputs, output, token_of)
    expected = torch.cat(
        [
            expert.product_of_integers(inputs[token_of[first:][:count].long()], 64)
            for expert, (_, _, first, count) in zip(experts, jobs, strict=True)
        ]
    )
    assert_close(output / inner**0.5, expected, 1e-2)
    parts = torch.full_like(output, torch.nan)
    for call in in_calls(jobs, 7):
        assert sum(count for _, _, _, count in call) <= 7
        wide.wide_experts(experts[0].expert, call, inputs, parts, token_of)
    assert torch.equal(parts, output), "the same in calls of a few rows"


def test_what_is_not_finite_stays_in_its_row(wide: Kernels) -> None:
    matrix, _ = quantized(40, 64, 4, 64)
    inputs = normal(14, 64, dtype=BFLOAT)
    inputs[3, 5] = torch.nan
    output = Products(wide, 0).linear(matrix, inputs)
    assert torch.isnan(output[3]).all()
    assert torch.isfinite(output[[*range(3), *range(4, 14)]]).all()


@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
def test_many_tokens_go_in_parts(bits: int, group: int, wide: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, weights = quantized(40, 96, bits, group)
    inputs, bias = normal(50, 96, dtype=BFLOAT), normal(40, dtype=BFLOAT)
    products = Products(wide, 0)
    whole = products.linear(matrix, inputs, bias)
    monkeypatch.setattr("offload.compute.product.DECODE_BYTES", panel_bytes(matrix.layout) * 7)
    assert wide_rows(panel_bytes(matrix.layout)) == 7
    assert torch.equal(products.linear(matrix, inputs, bias), whole)
    assert_close(whole, as_integers(inputs, bits, matrix.layout.group or 64) @ weights.t() + bias.double(), 6e-3)


@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
def test_what_is_lost_is_small_beside_what_the_weights_lost(bits: int, group: int, wide: Kernels) -> None:
    original = normal(128, 512, seed=4)
    matrix, weights = quantized(128, 512, bits, group, seed=4)
    inputs = normal(64, 512, dtype=BFLOAT)
    found = torch.empty(64, 128)
    wide.wide_linear(matrix.layout.shape, [(*address(matrix), 0, 64)], inputs, found)
    exact = inputs.double() @ weights.t()
    by_the_weights = (exact - inputs.double() @ (original.double() + 0.05).t()).square().mean().sqrt()
    assert (found - exact).square().mean().sqrt() <= 0.12 * by_the_weights


def test_what_the_kernel_does_not_take(wide: Kernels) -> None:
    assert Products(wide, 0).takes_wide(BFLOAT)
    assert not Products(wide, 0).takes_wide(torch.float32)
    assert not Products(None, 0).takes_wide(BFLOAT)
