"""The compiled kernels: products agree with the decoded weights in float64, and the result of a row of the input
depends on nothing but that row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch

from offload.compute.kernels import Kernels
from offload.compute.kernels.binding import Expert
from offload.compute.matrix import MatrixLayout, QuantizedMatrix, decode, empty_matrix, encode
from offload.compute.product import Products

LAYOUTS = [(8, 0), (4, 32), (4, 64), (4, 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = [1, 3, 8, 64, 300]
# Root mean square of the error relative to that of the result. Weights are exact here, inputs too: what is left is the
# rounding of sums, of the output, where weights are decoded for the library's product, of the weights, and, in the
# kernels, of bfloat16 inputs to 8 bits beside weights of 4.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}
EIGHT_BITS = 1e-2
SHAPES = [(1, 24), (5, 77), (33, 100), (70, 200), (96, 256), (31, 31)]


def quantized(rows: int, columns: int, bits: int, group: int, seed: int = 0) -> tuple[QuantizedMatrix, torch.Tensor]:
    """A matrix and its very weights in float64."""
    matrix = empty_matrix(MatrixLayout.make(rows, columns, bits, group or 64))
    encode(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.05, matrix, None)
    return matrix, decode(matrix, torch.float32, None).double()


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor, bound: float, size: torch.Tensor | None = None) -> None:
    """``expected`` is float64; the error counts relative to ``size``, by default that of what is expected."""
    assert torch.isfinite(found).all()
    error = (found.double() - expected).square().mean().sqrt()
    error /= (expected if size is None else size).square().mean().sqrt()
    assert error <= bound, f"{error:.2g} is above {bound:.2g}"


def as_integers(inputs: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """What the kernels' integers stand for, float64: a scale for each group of columns, and 8 bits beside weights of 4,
    15 beside 8.
    """
    most = 127 if bits == 4 else 127 * 128
    columns = inputs.shape[1]
    padded = torch.nn.functional.pad(inputs.float(), (0, -columns % group))
    groups = padded.view(len(inputs), -(-columns // group), group)
    largest = groups.abs().amax(-1, keepdim=True)
    codes = (groups * (most / largest.where(largest > 0, 1))).round()  # in float32, as it decides between neighbours
    return (codes.double() * (largest / most).double()).flatten(1)[:, :columns]


def address(matrix: QuantizedMatrix) -> tuple[int, int]:
    return matrix.codes.data_ptr(), matrix.params.data_ptr()


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# --- Products.linear ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
@pytest.mark.parametrize("few", [None, 0, 16, 1 << 30], ids=["without", "many", "both", "few"])
def test_linear_by_any_way(
    few: int | None,
    bits: int,
    group: int,
    shape: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    request: pytest.FixtureRequest,
) -> None:
    """Without the kernels, and with them: that for many tokens, that for few, and whichever the number says."""
    matrix, weights = quantized(*shape, bits, group)
    inputs = normal(tokens, shape[1], dtype=dtype)
    products = Products(None) if few is None else Products(request.getfixturevalue("kernels"), few)
    output = products.linear(matrix, inputs)
    assert (output.shape, output.dtype) == ((tokens, shape[0]), dtype)
    # a single sum may be small by chance: what it can lose is a share of its terms
    size = inputs.double().abs() @ weights.abs().t() if output.numel() < 10 else None
    assert_close(
        output,
        inputs.double() @ weights.t(),
        EIGHT_BITS if bits == 4 and dtype == torch.bfloat16 else BOUNDS[dtype],
        size,
    )


@pytest.mark.parametrize("shape", [(5, 77), (33, 100), (96, 256), (40, 480)])
@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
def test_few_tokens_as_integers(bits: int, group: int, shape: tuple[int, int], kernels: Kernels) -> None:
    if not kernels.integer_dot:
        pytest.skip("this processor has no integer dot products")
    matrix, weights = quantized(*shape, bits, group)
    inputs, output = normal(7, shape[1], dtype=torch.bfloat16), torch.empty(7, shape[0])
    kernels.linear(matrix.layout.shape, [(*address(matrix), 0, 7)], inputs, output)
    expected = as_integers(inputs, bits, matrix.layout.group or 128) @ weights.t()
    assert_close(output, expected, 1e-5 if bits == 8 else 5e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_linear_with_a_bias_and_strange_strides(bits: int, dtype: torch.dtype, either: Kernels | None) -> None:
    matrix, weights = quantized(40, 100, bits, 64)
    bias = normal(40, seed=2, dtype=dtype)
    inputs = normal(100, 5, dtype=dtype).t()
    output = Products(either).linear(matrix, inputs, bias)
    assert_close(output, inputs.double() @ weights.t() + bias.double(), BOUNDS[dtype] * 1.5)


@pytest.mark.parametrize("bits", [8, 4])
def test_matrices_larger_than_the_decode_buffer(
    bits: int, either: Kernels | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, weights = quantized(203, 100, bits, 64)
    inputs, bias = normal(40, 100), normal(203, seed=2)
    monkeypatch.setattr("offload.compute.product.DECODE_BYTES", 100 * 4 * 48)
    products = Products(either, 0)
    assert_close(products.linear(matrix, inputs, bias), inputs.double() @ weights.t() + bias, BOUNDS[torch.float32])
    assert products._buffer.numel() <= 100 * 4 * 48


@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
def test_large_and_small_inputs(bits: int, group: int, kernels: Kernels) -> None:
    matrix, weights = quantized(20, 256, bits, group)
    for dtype in (torch.float32, torch.bfloat16):
        bound = EIGHT_BITS if bits == 4 and dtype is torch.bfloat16 else BOUNDS[dtype]
        for size in (1e-30, 1e30):
            inputs = (normal(3, 256) * size).to(dtype)
            assert_close(Products(kernels).linear(matrix, inputs), inputs.double() @ weights.t(), bound)
    assert not Products(kernels).linear(matrix, torch.zeros(2, 256)).any()


# --- Kernels.linear -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
def test_several_jobs(
    bits: int, group: int, shape: tuple[int, int], dtype: torch.dtype, threads: int, kernels: Kernels
) -> None:
    counts = (1, 4, 2, 7, 1, 12)
    matrices = [quantized(*shape, bits, group, seed=number) for number in range(len(counts))]
    inputs = normal(9, shape[1], dtype=dtype)
    integers = dtype is torch.bfloat16 and kernels.integer_dot
    exact = as_integers(inputs, bits, matrices[0][0].layout.group or 128) if integers else inputs.double()
    token_of = torch.randint(0, 9, (sum(counts) + 2,), dtype=torch.int32)
    output = torch.full((len(token_of), shape[0]), 7.0)
    jobs, expected, first = [], torch.full(output.shape, 7.0, dtype=torch.float64), 1  # row 0 and the last are no job's
    for (matrix, weights), count in zip(matrices, counts, strict=True):
        jobs.append((*address(matrix), first, count))
        rows = slice(first, first + count)
        expected[rows] = exact[token_of[rows].long()] @ weights.t()
        first += count
    kernels.linear(matrices[0][0].layout.shape, jobs[::-1], inputs, output, token_of)
    assert (output[0] == 7).all()
    assert (output[-1] == 7).all()
    assert_close(output, expected, 5e-4 if integers else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 77), (70, 200), (96, 256), (40, 640)])
@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
def test_a_row_does_not_depend_on_the_others(
    bits: int, group: int, shape: tuple[int, int], dtype: torch.dtype, kernels: Kernels
) -> None:
    """To the last bit, whatever number of rows, jobs and threads there are."""
    matrix, _ = quantized(*shape, bits, group)
    other, _ = quantized(*shape, bits, group, seed=9)
    inputs = normal(23, shape[1], dtype=dtype)
    alone = torch.empty(23, shape[0])
    for token in range(23):
        job = (*address(matrix), 0, 1)
        kernels.linear(matrix.layout.shape, [job], inputs[token : token + 1], alone[token : token + 1])
    before = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            for count in (2, 3, 4, 5, 7, 8, 23):
                output = torch.empty(count, shape[0])
                kernels.linear(matrix.layout.shape, [(*address(matrix), 0, count)], inputs[:count], output)
                assert torch.equal(output, alone[:count]), f"{count} tokens"
            output = torch.empty(23, shape[0])
            jobs = [(*address(matrix), 0, 3), (*address(other), 3, 13), (*address(matrix), 16, 7)]
            kernels.linear(matrix.layout.shape, jobs, inputs, output)
            assert torch.equal(output[:3], alone[:3])
            assert torch.equal(output[16:], alone[16:])
    finally:
        torch.set_num_threads(before)


# --- whole experts --------------------------------------------------------------------------------------------------


class Gated(NamedTuple):
    """An expert's matrices in one piece of memory, as in a record, and their weights in float64."""

    memory: torch.Tensor
    expert: Expert
    gate_up: torch.Tensor
    down: torch.Tensor

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        gate, up = (inputs.double() @ self.gate_up.t()).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up) @ self.down.t()

    def product_of_integers(self, inputs: torch.Tensor, block: int) -> torch.Tensor:
        """With inputs and inner states as integers stand for them; ``block`` columns have a scale beside 8 bits."""
        outer, inner = self.expert.gate_up, self.expert.down
        states = as_integers(inputs, outer.bits, outer.group or block)
        gate, up = (states @ self.gate_up.t()).chunk(2, -1)
        states = torch.nn.functional.silu(gate) * up
        return as_integers(states, inner.bits, inner.group or block) @ self.down.t()


def jobs_of(
    experts: Sequence[Gated], inputs: torch.Tensor
) -> tuple[list[tuple[int, int, int, int]], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Jobs of experts, of the first with all tokens and one less each; their tokens, room for products, and these."""
    rows_of = [torch.arange(len(inputs))[number:] for number in range(len(experts))]  # the last may have none
    token_of = torch.cat(rows_of).to(torch.int32)
    output = torch.full((len(token_of), inputs.shape[1]), torch.nan)
    jobs, expected, first = [], torch.empty(output.shape, dtype=torch.float64), 0
    for expert, rows in zip(experts, rows_of, strict=True):
        jobs.append((expert.memory.data_ptr(), 0, first, len(rows)))
        expected[first : first + len(rows)] = expert.product(inputs[rows])
        first += len(rows)
    return jobs, token_of, output, expected


def gated(hidden: int, inner: int, up_bits: tuple[int, int], down_bits: tuple[int, int], seed: int) -> Gated:
    matrices = quantized(2 * inner, hidden, *up_bits, seed), quantized(hidden, inner, *down_bits, seed + 100)
    memory = torch.zeros(sum(matrix.layout.bytes + 128 for matrix, _ in matrices), dtype=torch.uint8)
    offsets, end = [], 0
    for matrix, _ in matrices:
        for part in (matrix.codes, matrix.params):
            data = part.reshape(-1).view(torch.uint8)
            memory[end : end + len(data)] = data
            offsets.append(end)
            end += (len(data) + 63) // 64 * 64
    expert = Expert(matrices[0][0].layout.shape, matrices[1][0].layout.shape, *offsets)
    return Gated(memory, expert, matrices[0][1], matrices[1][1] / inner**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    ("hidden", "inner", "up_bits", "down_bits"),
    [
        (128, 96, (4, 64), (4, 64)),
        (128, 96, (8, 0), (8, 0)),
        (128, 96, (4, 64), (8, 0)),
        (77, 24, (4, 32), (4, 32)),
        (200, 100, (4, 128), (4, 128)),
        (100, 33, (8, 0), (4, 64)),
        (64, 1, (4, 64), (4, 64)),
    ],
)
def test_silu_experts(
    hidden: int,
    inner: int,
    up_bits: tuple[int, int],
    down_bits: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    threads: int,
    kernels: Kernels,
) -> None:
    experts = [gated(hidden, inner, up_bits, down_bits, seed) for seed in range(3)]
    inputs = normal(tokens, hidden, dtype=dtype) / hidden**0.5
    jobs, token_of, output, expected = jobs_of(experts, inputs)
    kernels.silu_experts(experts[0].expert, jobs, inputs, output, token_of)
    scale = inner**0.5  # the reference's down projection was divided by it
    bound = 1e-5 if inner > 1 else 1e-4  # a single gate may be small by chance
    if dtype is torch.bfloat16 and kernels.integer_dot:
        expected = torch.cat(
            [
                expert.product_of_integers(inputs[token_of[first:][:count].long()], 128)
                for expert, (_, _, first, count) in zip(experts, jobs, strict=True)
            ]
        )
        bound = 1e-2  # a state may fall on either of two integers
    assert_close(output / scale, expected, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [(8, 0), (4, 64)])
def test_an_experts_rows_do_not_depend_on_the_others(
    bits: tuple[int, int], dtype: torch.dtype, kernels: Kernels
) -> None:
    experts = [gated(128, 72, bits, bits, seed) for seed in range(3)]
    inputs = normal(11, 128, dtype=dtype)

    def run(jobs: list[tuple[int, int, int]], token_of: list[int], threads: int, tokens: torch.Tensor) -> torch.Tensor:
        """``jobs`` are (expert, first row, rows)."""
        output = torch.full((len(token_of), 128), torch.nan)
        addresses = [(experts[expert].memory.data_ptr(), 0, first, count) for expert, first, count in jobs]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        kernels.silu_experts(experts[0].expert, addresses, tokens, output, torch.tensor(token_of, dtype=torch.int32))
        torch.set_num_threads(before)
        return output

    alone = torch.cat([run([(0, 0, 1)], [0], 1, inputs[token : token + 1]) for token in range(11)])
    assert torch.isfinite(alone).all()
    for threads in (1, 2, 5):
        assert torch.equal(run([(0, 0, 11)], list(range(11)), threads, inputs), alone)
        together = run([(1, 0, 4), (0, 4, 5), (2, 9, 2)], [0, 1, 2, 3, 6, 7, 8, 9, 10, 0, 1], threads, inputs)
        assert torch.equal(together[4:9], alone[6:11])
        decode_step = run([(2, 0, 1), (0, 1, 1), (1, 2, 1)], [0, 0, 0], threads, inputs[3:4])
        assert torch.equal(decode_step[1:2], alone[3:4])
        waves = run([(0, 1, 1)], [0, 0, 0], threads, inputs[3:4])
        assert torch.equal(waves[1:2], alone[3:4])
        assert torch.isnan(waves[[0, 2]]).all(), "rows of no job are left alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_that_goes_through_an_expert_twice(dtype: torch.dtype, kernels: Kernels) -> None:
    experts = [gated(64, 32, (4, 64), (4, 64), seed) for seed in range(2)]
    inputs = normal(1, 64, dtype=dtype)
    output = torch.full((6, 64), torch.nan)
    jobs = [(experts[0].memory.data_ptr(), 0, 0, 5), (experts[1].memory.data_ptr(), 0, 5, 1)]
    kernels.silu_experts(experts[0].expert, jobs, inputs, output, torch.zeros(6, dtype=torch.int32))
    assert (output[:5] == output[0]).all()
    for row, expert in ((0, experts[0]), (5, experts[1])):
        assert_close(output[row : row + 1] / 32**0.5, expert.product(inputs), 1e-5 if dtype is torch.float32 else 3e-2)


def test_silu_of_large_values(kernels: Kernels) -> None:
    expert = gated(64, 32, (8, 0), (8, 0), 0)
    for size in (0.0, 1e-20, 10.0, 1e3, 1e8):
        inputs = normal(2, 64) * size
        output = torch.empty(2, 64)
        token_of = torch.tensor([0, 1], dtype=torch.int32)
        kernels.silu_experts(expert.expert, [(expert.memory.data_ptr(), 0, 0, 2)], inputs, output, token_of)
        expected = expert.product(inputs)
        if size:
            assert_close(output / 32**0.5, expected, 1e-5)
        else:
            assert not output.any()


# --- combine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "tokens", "hidden"), [(1, 1, 5), (8, 1, 300), (40, 7, 77), (2400, 300, 100)])
def test_combine(rows: int, tokens: int, hidden: int, dtype: torch.dtype, threads: int, kernels: Kernels) -> None:
    products, weights = normal(rows, hidden), normal(rows, seed=2).abs()
    token_of = torch.randint(0, max(1, tokens - 1), (rows,), dtype=torch.int32)  # the last token may have no row
    output = torch.full((tokens, hidden), torch.nan, dtype=dtype)
    kernels.combine(products, weights, token_of, output)
    expected = torch.zeros(tokens, hidden, dtype=torch.float64)
    expected.index_add_(0, token_of, products.double() * weights.double()[:, None])
    assert_close(output, expected, 1e-6 if dtype is torch.float32 else 4e-3)
    assert not output[~torch.isin(torch.arange(tokens), token_of)].any()


def test_combine_adds_in_the_order_of_rows(kernels: Kernels) -> None:
    products = torch.tensor([[1e8], [1.0], [-1e8]]).expand(3, 150).contiguous()  # vectors and single columns
    output = torch.empty(1, 150)
    kernels.combine(products, torch.ones(3), torch.zeros(3, dtype=torch.int32), output)
    assert (output == 0).all(), "the 1 is lost in 1e8, which was there first"
    kernels.combine(products[[0, 2, 1]].contiguous(), torch.ones(3), torch.zeros(3, dtype=torch.int32), output)
    assert (output == 1).all()
