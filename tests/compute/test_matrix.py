"""Quantised matrices: what is lost is no more than the bits demand, the kernels and torch agree, and odd matrices are
no trouble. Products are tested in test_kernels.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from offload.compute.kernels import Kernels
from offload.compute.matrix import Error, MatrixLayout, QuantizedMatrix, decode, empty_matrix, encode

LAYOUTS = [(8, 0), (4, 32), (4, 64), (4, 128)]
# Root mean square error relative to that of normally distributed weights. The best that 16 levels for groups of 32,
# 64 and 128 can do is little below; a scale from the range alone loses 0.078, 0.090 and 0.100.
NORMAL_LOSS = {(8, 0): 0.0085, (4, 32): 0.0705, (4, 64): 0.083, (4, 128): 0.0935}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ODD_SHAPES = [(1, 1), (1, 256), (3, 24), (5, 77), (33, 100), (7, 200), (2, 31), (65, 129), (17, 640)]


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def quantized(
    weights: torch.Tensor, bits: int, group: int, kernels: Kernels | None
) -> tuple[QuantizedMatrix, torch.Tensor, Error]:
    """The matrix, its weights decoded to float32 by torch, and what was lost. Every byte of it is written."""
    matrix = empty_matrix(MatrixLayout.make(*weights.shape, bits, group or 64))
    matrix.codes.fill_(0x55)
    matrix.params.fill_(math.nan)
    lost = encode(weights, matrix, kernels)
    return matrix, decode(matrix, torch.float32, None), lost


def relative_error(decoded: torch.Tensor, weights: torch.Tensor) -> float:
    exact = weights.double()
    return float((decoded.double() - exact).norm() / exact.norm())


# --- layout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "group", "kept", "padded"),
    [(1, 64, 32, 32), (32, 64, 32, 32), (33, 64, 64, 64), (77, 64, 64, 128), (100, 128, 128, 128), (768, 64, 64, 768)],
)
def test_layout_of_4_bits(columns: int, group: int, kept: int, padded: int) -> None:
    layout = MatrixLayout.make(5, columns, 4, group)
    assert (layout.group, layout.padded) == (kept, padded)
    assert layout.codes_shape == (5, padded // 2)
    assert layout.params_shape == (5, padded // kept, 2)
    assert layout.bytes == 5 * padded // 2 + 5 * padded // kept * 4


def test_layout_of_8_bits() -> None:
    layout = MatrixLayout.make(5, 77, 8)
    assert (layout.group, layout.padded, layout.codes_shape, layout.params_shape) == (0, 77, (5, 77), (5,))
    assert layout.bytes == 5 * 77 + 5 * 4


@pytest.mark.parametrize(("bits", "group"), [(3, 64), (4, 16), (4, 0), (2, 32)])
def test_unknown_layouts(bits: int, group: int) -> None:
    with pytest.raises(ValueError, match="are no known layout"):
        MatrixLayout.make(8, 64, bits, group)


# --- what is lost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
def test_loss_of_normal_weights(bits: int, group: int, dtype: torch.dtype, either: Kernels | None) -> None:
    weights = (normal(128, 1024) * 0.02).to(dtype)
    _, decoded, lost = quantized(weights, bits, group, either)
    assert lost.relative < NORMAL_LOSS[bits, group]
    assert lost.relative == pytest.approx(relative_error(decoded, weights), rel=1e-4)
    assert lost.all == pytest.approx(weights.double().square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_search_beats_the_plain_range(group: int, either: Kernels | None) -> None:
    for heavy_tails in (False, True):
        weights = normal(64, 1024, seed=1)
        weights = weights * normal(64, 1024, seed=2).abs() if heavy_tails else weights
        groups = weights.view(64, -1, group)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low) / 15
        plain = (((groups - low) / scale).round() * scale + low).view(64, 1024)
        _, decoded, _ = quantized(weights, 4, group, either)
        assert relative_error(decoded, weights) < 0.95 * relative_error(plain, weights)


@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
def test_no_weight_is_far_off(bits: int, group: int, either: Kernels | None) -> None:
    """Within half a step of its code, but for the ends of a group's range, which the search may give up a little."""
    weights = normal(64, 1024, seed=3)
    matrix, decoded, _ = quantized(weights, bits, group, either)
    away = (decoded - weights).abs()
    if bits == 8:
        assert (away <= matrix.params[:, None] * 0.5001).all()
        return
    step = matrix.params[..., 0].float().repeat_interleave(group, 1)
    codes = torch.stack([matrix.codes & 15, matrix.codes >> 4], -1).view(64, -1)
    inside = (codes > 0) & (codes < 15)
    assert (away <= step * 0.5001)[inside].all()
    assert (away <= step * 2.5).all()


# --- kernels and torch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_kernels_and_torch_quantise_alike(
    shape: tuple[int, int], bits: int, group: int, dtype: torch.dtype, kernels: Kernels
) -> None:
    weights = normal(*shape, seed=shape[1]).to(dtype)
    ours, our_decoded, our_loss = quantized(weights, bits, group, kernels)
    theirs, their_decoded, their_loss = quantized(weights, bits, group, None)
    assert our_loss.relative == pytest.approx(their_loss.relative, rel=5e-3, abs=1e-7)
    assert our_loss.all == pytest.approx(their_loss.all, rel=1e-6)
    if bits == 8:
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.params, theirs.params)
        return
    # sums in another order may make another trial the best, or round a scale or a code that is a tie the other way
    same = (ours.params == theirs.params).all(-1)
    assert same.float().mean() > 0.9 or (~same).sum() <= 2
    differing = (our_decoded != their_decoded).float().mean()
    assert differing < 0.1 + (~same).float().mean()
    step = ours.params[..., 0].float().amax(-1, keepdim=True)
    assert ((our_decoded - their_decoded).abs() <= step * 1.1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_kernels_and_torch_decode_alike(
    shape: tuple[int, int], bits: int, group: int, dtype: torch.dtype, kernels: Kernels
) -> None:
    matrix, decoded, _ = quantized(normal(*shape, seed=shape[0]), bits, group, None)
    assert torch.equal(decode(matrix, dtype, kernels), decode(matrix, dtype, None))
    assert torch.equal(decode(matrix, dtype, kernels), decoded.to(dtype)), "rounded once"
    out = torch.full((shape[0] + 1, shape[1]), 7.0, dtype=dtype)
    decode(matrix, dtype, kernels, out[:-1])
    assert torch.equal(out[:-1], decoded.to(dtype))
    assert (out[-1] == 7).all(), "nothing behind it is touched"


@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
def test_quantising_does_not_depend_on_threads(bits: int, group: int, kernels: Kernels) -> None:
    weights = normal(300, 200).to(torch.bfloat16)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(quantized(weights, bits, group, kernels))
    finally:
        torch.set_num_threads(threads)
    for matrix, _, lost in found[1:]:
        assert torch.equal(matrix.codes, found[0][0].codes)
        assert torch.equal(matrix.params, found[0][0].params)
        assert lost == found[0][2], "to the last bit: a resumed pack is the same as one made in one go"


# --- odd matrices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_odd_shapes(shape: tuple[int, int], bits: int, group: int, either: Kernels | None) -> None:
    weights = normal(*shape, seed=5)
    matrix, decoded, lost = quantized(weights, bits, group, either)
    assert decoded.shape == shape
    assert lost.relative == pytest.approx(relative_error(decoded, weights), rel=1e-4, abs=1e-7)
    assert lost.relative < NORMAL_LOSS[bits, group] * 1.15
    if bits == 4:
        codes = torch.stack([matrix.codes & 15, matrix.codes >> 4], -1).view(shape[0], -1)
        assert not codes[:, shape[1] :].any(), "padding is zero"


@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
def test_weights_that_are_not_contiguous(bits: int, group: int, either: Kernels | None) -> None:
    weights = normal(96, 40).to(torch.bfloat16)
    strided, _, _ = quantized(weights.t(), bits, group, either)
    plain, _, _ = quantized(weights.t().contiguous(), bits, group, either)
    assert torch.equal(strided.codes, plain.codes)
    assert torch.equal(strided.params, plain.params)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -0.3, 1e30, -1e-30])
@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
def test_constant_rows(bits: int, group: int, value: float, either: Kernels | None) -> None:
    weights = torch.full((6, 100), value)
    weights[3] = normal(1, 100)[0]
    _, decoded, lost = quantized(weights, bits, group, either)
    constant = torch.cat([decoded[:3], decoded[4:]])
    assert (constant == constant[0, 0]).all()
    # with 4 bits the constant is the shift, a bfloat16
    assert constant[0, 0].item() == pytest.approx(value, rel=1e-6 if bits == 8 else 2**-8)
    assert relative_error(decoded[3], weights[3]) < NORMAL_LOSS[bits, group] * 1.2
    assert lost.finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-10, 1e10, 1e30, 1e37])
@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
def test_huge_and_tiny_weights(bits: int, group: int, size: float, dtype: torch.dtype, either: Kernels | None) -> None:
    weights = (normal(8, 256) * size).to(dtype)
    _, decoded, lost = quantized(weights, bits, group, either)
    assert lost.finite
    assert lost.relative == pytest.approx(relative_error(decoded, weights), rel=1e-3)
    assert lost.relative < NORMAL_LOSS[bits, group] * 1.1


@pytest.mark.parametrize("size", [1e-40, 1e-44])
@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
def test_weights_too_small_for_a_scale_stay_small(bits: int, group: int, size: float, either: Kernels | None) -> None:
    weights = normal(8, 256) * size
    _, decoded, lost = quantized(weights, bits, group, either)
    assert lost.finite
    assert (decoded.abs() <= 2 * weights.abs().max()).all()


@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
def test_one_huge_weight_spoils_its_group_or_row_only(bits: int, group: int, either: Kernels | None) -> None:
    weights = normal(4, 256)
    weights[2, 5] = 1e30
    _, decoded, lost = quantized(weights, bits, group, either)
    assert lost.finite
    assert decoded[2, 5].item() == pytest.approx(1e30, rel=0.01)
    others = torch.cat([decoded[:2], decoded[3:]]), torch.cat([weights[:2], weights[3:]])
    assert relative_error(*others) < NORMAL_LOSS[bits, group] * 1.1
    if bits == 4:
        assert relative_error(decoded[2, group:], weights[2, group:]) < NORMAL_LOSS[bits, group] * 1.2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 99), (4, 77)])
@pytest.mark.parametrize(("bits", "group"), LAYOUTS)
def test_what_is_no_number_is_told(
    bits: int, group: int, place: tuple[int, int], value: float, either: Kernels | None
) -> None:
    for dtype in DTYPES:
        weights = normal(5, 100).to(dtype)
        weights[place] = value
        assert not quantized(weights, bits, group, either)[2].finite


def test_errors_add_up() -> None:
    assert Error().relative == 0
    assert Error(1.0, 4.0).plus(Error(3.0, 12.0)) == Error(4.0, 16.0)
    assert Error(4.0, 16.0).relative == 0.5
    assert Error(4.0, 16.0).finite
    assert not Error(math.inf, 1.0).finite
    assert not Error(1.0, math.nan).finite
