"""The compiled kernels for published formats: decoded, torch's bits; multiplied, torch's products within rounding."""

from __future__ import annotations

import pytest
import torch

from offload.checkpoint.formats.awq import AwqLayout
from offload.checkpoint.formats.bitsandbytes import BitsAndBytesLayout
from offload.checkpoint.formats.compressed import CompressedLayout
from offload.checkpoint.formats.fp8 import Fp8Layout
from offload.checkpoint.formats.gguf import GgufLayout
from offload.checkpoint.formats.gptq import GptqLayout
from offload.checkpoint.formats.mxfp4 import Mxfp4Layout
from offload.checkpoint.formats.nvfp4 import Nvfp4Layout
from offload.checkpoint.formats.packed import PackedLayout, PackedMatrix, PackedParameter
from offload.compute.decoded import Decoder
from offload.compute.kernels import published
from offload.compute.kernels.published import FEW_TOKENS, PublishedKernels, load_published

LAYOUTS = [
    Fp8Layout((300, 200), 128, 128, "float8_e4m3fn", "float32"),
    Fp8Layout((64, 96), 1, 96, "float8_e4m3fn", "bfloat16"),
    Fp8Layout((5, 700), 5, 700, "float8_e4m3fn", "float32"),
    Mxfp4Layout((64, 96), 0),
    Mxfp4Layout((96, 50), 1),
    CompressedLayout((30, 128), 4, 32, "bfloat16", 0, 0),
    CompressedLayout((7, 256), 4, 128, "bfloat16", 0, 0),
    CompressedLayout((18, 1152), 4, 32, "bfloat16", 0, 0),
    CompressedLayout((37, 256), 4, 128, "bfloat16", 1, 0),
    CompressedLayout((30, 352), 4, 32, "float16", 0, 0),
    CompressedLayout((16, 96), 4, 96, "float16", 1, 0),
    GgufLayout((33, 96), "Q4_0"),
    GgufLayout((20, 352), "Q8_0"),
    GgufLayout((17, 512), "Q4_K"),
    GgufLayout((17, 512), "Q5_K"),
    GgufLayout((16, 768), "Q6_K"),
    Nvfp4Layout((50, 352), 0),
    Nvfp4Layout((64, 96), 1),
    GptqLayout((64, 256), 4, 2, "float16", 1, 0),
    GptqLayout((200, 352), 4, 11, "bfloat16", 0, 0),
    GptqLayout((72, 352), 4, 11, "float16", 1, 1),
    GptqLayout((8, 96), 4, 1, "float16", 1, 1),
    AwqLayout((256, 128), 32, "float16"),
    AwqLayout((136, 672), 224, "bfloat16"),
    AwqLayout((48, 96), 96, "float16"),
    BitsAndBytesLayout((48, 96), 64, 0),
    BitsAndBytesLayout((33, 288), 64, 16),
]
NOT_THERE = [
    Fp8Layout((64, 96), 32, 32, "float8_e5m2", "float32"),
    Fp8Layout((64, 96), 32, 32, "float8_e4m3fn", "uint8"),
    CompressedLayout((30, 128), 8, 32, "bfloat16", 0, 0),
    CompressedLayout((32, 128), 4, 32, "bfloat16", 1, 1),
    CompressedLayout((30, 128), 4, 32, "float32", 0, 0),
    CompressedLayout((30, 80), 4, 32, "bfloat16", 0, 0),
    GptqLayout((64, 256), 8, 2, "float16", 1, 0),
    GptqLayout((64, 256), 4, 2, "float32", 1, 0),
    GptqLayout((64, 96), 4, 6, "float16", 1, 0),
    GptqLayout((64, 40), 4, 1, "float16", 1, 0),
    GptqLayout((64, 352), 4, 3, "float16", 1, 0),
    AwqLayout((48, 96), 16, "float16"),
    BitsAndBytesLayout((48, 50), 64, 0),
    Nvfp4Layout((64, 48), 0),
    GgufLayout((16, 256), "Q3_K"),
]


@pytest.fixture(scope="module")
def kernels() -> PublishedKernels:
    found = load_published()
    if found is None:
        pytest.skip("this machine has no compiled kernels")
    return found


def random_matrix(layout: PackedLayout) -> PackedMatrix:
    """Every code there is, and scales of any size."""
    random = torch.Generator().manual_seed(3)
    parts = []
    for part in layout.parts:
        if part.dtype in (torch.float32, torch.bfloat16, torch.float16):
            parts.append((torch.randn(part.shape, generator=random) * 0.1).to(part.dtype))
        elif isinstance(layout, GgufLayout):
            parts.append(random_blocks(layout, random))
        else:
            data = torch.randint(0, 256, (part.bytes,), dtype=torch.uint8, generator=random)
            data = data.clamp(max=250) if part.name == "scale" else data
            if part.name == "order":
                assert isinstance(layout, GptqLayout | CompressedLayout)
                inputs = layout.shape[1]
                group = layout.group if isinstance(layout, CompressedLayout) else inputs // layout.groups
                data = (torch.randperm(inputs, generator=random) // group).int()
            parts.append(data.view(part.dtype).view(part.shape))
    return PackedMatrix(layout, tuple(parts))


def random_blocks(layout: GgufLayout, random: torch.Generator) -> torch.Tensor:
    """Any codes, and halves that are numbers where the blocks have theirs."""
    (blocks,) = layout.parts
    data = torch.randint(0, 256, blocks.shape, dtype=torch.uint8, generator=random)
    size, at = {"Q4_0": (18, (0,)), "Q8_0": (34, (0,)), "Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)),
                "Q6_K": (210, (208,)), "Q3_K": (110, (108,))}[layout.type]  # fmt: skip
    every = data.view(-1, size)
    for place in at:
        halves = (torch.randn(len(every), 1, generator=random) * 0.1).half()
        every[:, place : place + 2] = halves.view(torch.uint8)
    every[0, at[0] : at[0] + 2] = torch.tensor([3, 0], dtype=torch.uint8)  # one that has not all of its bits
    return data


def by_torch(matrix: PackedMatrix, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(matrix.layout.shape, dtype=dtype)
    matrix.layout.decode(matrix.parts, out)
    return out


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.spec} {layout.shape}")
def test_the_same_bits(
    kernels: PublishedKernels, layout: PackedLayout, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "_SMALL", 0)
    matrix = random_matrix(layout)
    out = torch.full(layout.shape, 7, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert kernels.decode(matrix, out)
    finally:
        torch.set_num_threads(before)
    expected = by_torch(matrix, dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(3).view(torch.uint8), expected.nan_to_num(3).view(torch.uint8))


def finite_matrix(layout: PackedLayout) -> PackedMatrix:
    """:func:`random_matrix` with codes that are numbers, and scales that do not drown all but the largest weights."""
    matrix = random_matrix(layout)
    for part, data in zip(layout.parts, matrix.parts, strict=True):
        if data.dtype == torch.float8_e4m3fn:
            data.view(torch.uint8).bitwise_and_(0b10111111)
        elif isinstance(layout, Mxfp4Layout) and part.name == "scale":
            data.bitwise_and_(3).add_(120)
    return matrix


def product_of(
    kernels: PublishedKernels, matrix: PackedMatrix, inputs: torch.Tensor, threads: int = 2
) -> torch.Tensor | None:
    kernels._kernels.threads = threads
    try:
        return Decoder(kernels).product(PackedParameter((matrix,)), inputs, inputs_first(matrix.layout))
    finally:
        kernels._kernels.threads = None


def inputs_first(layout: PackedLayout) -> bool:
    return isinstance(layout, Mxfp4Layout) and layout.transposed


def inputs_of(layout: PackedLayout, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    inputs = layout.shape[0] if inputs_first(layout) else layout.shape[1]
    return torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.spec} {layout.shape}")
def test_products_are_those_of_the_decoded_weights(
    kernels: PublishedKernels, layout: PackedLayout, dtype: torch.dtype
) -> None:
    matrix = finite_matrix(layout)
    weights = by_torch(matrix, dtype).double()
    weights = weights if inputs_first(layout) else weights.t()
    for tokens in (1, 2, 3, 5, FEW_TOKENS):
        inputs = inputs_of(layout, tokens, dtype)
        found = product_of(kernels, matrix, inputs)
        assert found is not None and found.dtype == dtype
        terms = inputs.double().abs() @ weights.abs()  # sums of terms that cancel are no more exact than the terms
        rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}[dtype]
        exact = inputs.double() @ weights
        assert ((found.double() - exact).abs() <= rounding * exact.abs() + 2.0**-20 * terms).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.spec} {layout.shape}")
def test_a_product_depends_on_its_row_and_token_alone(
    kernels: PublishedKernels, layout: PackedLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "_SMALL", 0)
    matrix = finite_matrix(layout)
    inputs = inputs_of(layout, 7, torch.bfloat16)
    together = product_of(kernels, matrix, inputs, threads=3)
    assert together is not None
    for token in range(7):
        alone = product_of(kernels, matrix, inputs[token : token + 1], threads=1)
        assert alone is not None and torch.equal(alone[0], together[token])


def test_one_other_code_shows(kernels: PublishedKernels) -> None:
    matrix = finite_matrix(LAYOUTS[0])
    inputs = inputs_of(LAYOUTS[0], 1, torch.float32)
    before = product_of(kernels, matrix, inputs)
    matrix.parts[0].view(torch.uint8)[299, 199] ^= 0x81
    after = product_of(kernels, matrix, inputs)
    assert before is not None and after is not None
    assert (before != after).nonzero().tolist() == [[0, 299]]


def test_matrices_one_below_the_other_and_many_tokens(kernels: PublishedKernels) -> None:
    first, second = (finite_matrix(Fp8Layout((rows, 96), 32, 32, "float8_e4m3fn", "float32")) for rows in (40, 24))
    both, inputs = PackedParameter((first, second)), inputs_of(first.layout, 3, torch.bfloat16)
    decoder = Decoder(kernels)
    found = decoder.product(both, inputs, False)
    assert found is not None
    assert torch.equal(found[:, :40], decoder.product(PackedParameter((first,)), inputs, False))  # type: ignore[arg-type]
    assert torch.equal(found[:, 40:], decoder.product(PackedParameter((second,)), inputs, False))  # type: ignore[arg-type]
    assert decoder.product(both, inputs_of(first.layout, FEW_TOKENS + 1, torch.bfloat16), False) is None
    assert decoder.product(both, inputs, True) is None, "it is not held by its inputs"
    assert Decoder().product(both, inputs, False) is None


@pytest.mark.parametrize("layout", NOT_THERE, ids=lambda layout: f"{layout.spec} {layout.shape}")
def test_the_rest_is_left_to_torch(kernels: PublishedKernels, layout: PackedLayout) -> None:
    matrix = random_matrix(layout)
    assert not kernels.decode(matrix, torch.empty(layout.shape, dtype=torch.bfloat16))
    assert not kernels.takes(matrix, torch.bfloat16, False)
    assert Decoder(kernels).product(PackedParameter((matrix,)), torch.ones(1, 96, dtype=torch.bfloat16), False) is None
    found = Decoder(kernels).decode(PackedParameter((matrix, matrix)), torch.bfloat16)
    half = by_torch(matrix, torch.bfloat16)
    assert torch.equal(found.nan_to_num(), torch.cat([half, half]).nan_to_num())


def test_groups_of_any_size_are_left_to_torch(kernels: PublishedKernels) -> None:
    """Which no ordering by activations writes."""
    layout = GptqLayout((64, 96), 4, 3, "float16", 1, 1)
    matrix = random_matrix(layout)
    for group_of in (torch.zeros(96), torch.arange(96) % 4 - 1, torch.arange(96) % 4):
        matrix.parts[3].copy_(group_of)
        assert product_of(kernels, matrix, inputs_of(layout, 1, torch.bfloat16)) is None
        assert not kernels.decode(matrix, torch.empty(layout.shape, dtype=torch.bfloat16))


def test_other_dtypes_are_left_to_torch(kernels: PublishedKernels) -> None:
    matrix = random_matrix(LAYOUTS[0])
    assert not kernels.takes(matrix, torch.float64, False)
    assert not kernels.decode(matrix, torch.empty(matrix.layout.shape, dtype=torch.float64))
    transposed = torch.empty(matrix.layout.shape[::-1], dtype=torch.float32).t()
    assert not kernels.decode(matrix, transposed)


def test_memory_is_used_again() -> None:
    decoder = Decoder(load_published())
    large, small = (PackedParameter((random_matrix(layout),)) for layout in LAYOUTS[:2])
    first = decoder.decode(large, torch.bfloat16)
    second = decoder.decode(small, torch.bfloat16)
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(second.nan_to_num(), by_torch(random_matrix(LAYOUTS[1]), torch.bfloat16).nan_to_num())
