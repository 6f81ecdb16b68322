"""The kernels for many tokens, on processors that have them: products of the decoded weights, row by row."""

from __future__ import annotations

import pytest
import torch

from offload.compute.kernels import Kernels
from offload.compute.matrix import decode
from offload.compute.product import Products, wide_rows
from offload.compute.quantized_experts import in_calls
from tests.compute.test_kernels import LAYOUTS, address, assert_close, gated, jobs_of, normal, quantized

SHAPES = [(1, 32), (16, 64), (40, 160), (77, 256), (96, 480)]
BFLOAT = torch.bfloat16


@pytest.fixture
def wide(kernels: Kernels) -> Kernels:
    if not kernels.wide:
        pytest.skip("this processor does not multiply bfloat16")
    return kernels


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
def test_products_of_several_jobs(
    bits: int, group: int, shape: tuple[int, int], dtype: torch.dtype, wide: Kernels
) -> None:
    counts = (13, 1, 4, 12, 31, 8)
    matrices = [quantized(*shape, bits, group, seed=number)[0] for number in range(len(counts))]
    inputs = normal(9, shape[1], dtype=BFLOAT)
    token_of = torch.randint(0, 9, (sum(counts) + 2,), dtype=torch.int32)
    output = torch.full((len(token_of), shape[0]), 7.0, dtype=dtype)
    jobs, expected, first = [], torch.full(output.shape, 7.0, dtype=torch.float64), 1  # row 0 and the last are no job's
    for matrix, count in zip(matrices, counts, strict=True):
        jobs.append((*address(matrix), first, count))
        rows = slice(first, first + count)
        expected[rows] = inputs[token_of[rows].long()].double() @ decode(matrix, BFLOAT, wide).double().t()
        first += count
    wide.wide_linear(matrices[0].layout.shape, jobs[::-1], inputs, output, token_of)
    assert (output[0] == 7).all()
    assert (output[-1] == 7).all()
    assert_close(output, expected, 2e-6 if dtype is torch.float32 else 4e-3)


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


@pytest.mark.parametrize("bits", [(8, 0), (4, 32), (4, 64), (4, 128)])
@pytest.mark.parametrize("tokens", [1, 12, 50])
def test_whole_experts(tokens: int, bits: tuple[int, int], wide: Kernels) -> None:
    hidden, inner = 160, 96
    experts = [gated(hidden, inner, bits, bits, seed) for seed in range(3)]
    inputs = normal(tokens, hidden, dtype=BFLOAT) / hidden**0.5
    jobs, token_of, output, expected = jobs_of(experts, inputs)
    wide.wide_experts(experts[0].expert, jobs, inputs, output, token_of)
    assert_close(output / inner**0.5, expected, 6e-3)
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
    matrix, _ = quantized(40, 96, bits, group)
    inputs, bias = normal(50, 96, dtype=BFLOAT), normal(40, dtype=BFLOAT)
    products = Products(wide, 0)
    whole = products.linear(matrix, inputs, bias)
    monkeypatch.setattr("offload.compute.product.DECODE_BYTES", 2 * 96 * 7)
    assert wide_rows(96) == 7
    assert torch.equal(products.linear(matrix, inputs, bias), whole)
    assert_close(whole, inputs.double() @ decode(matrix, BFLOAT, wide).double().t() + bias.double(), 6e-3)


def test_what_the_kernel_does_not_take(wide: Kernels) -> None:
    products, (even, _), (odd, _) = Products(wide, 0), quantized(8, 64, 4, 64), quantized(8, 72, 4, 64)
    assert products.takes_wide(BFLOAT, even)
    assert not products.takes_wide(torch.float32, even)
    assert not products.takes_wide(BFLOAT, even, odd)
    assert not Products(None, 0).takes_wide(BFLOAT, even)
