"""The compiled decoders of published formats give the bits that torch gives."""

from __future__ import annotations

import pytest
import torch

from offload.checkpoint.formats.awq import AwqLayout
from offload.checkpoint.formats.compressed import CompressedLayout
from offload.checkpoint.formats.fp8 import Fp8Layout
from offload.checkpoint.formats.mxfp4 import Mxfp4Layout
from offload.checkpoint.formats.packed import PackedLayout, PackedMatrix, PackedParameter
from offload.compute.decoded import Decoder
from offload.compute.kernels import published
from offload.compute.kernels.published import Decoders, load_decoders

LAYOUTS = [
    Fp8Layout((300, 200), 128, 128, "float8_e4m3fn", "float32"),
    Fp8Layout((64, 96), 1, 96, "float8_e4m3fn", "bfloat16"),
    Fp8Layout((5, 700), 5, 700, "float8_e4m3fn", "float32"),
    Mxfp4Layout((64, 96), 0),
    Mxfp4Layout((96, 50), 1),
    CompressedLayout((30, 128), 4, 32, "bfloat16", 0, 0),
    CompressedLayout((7, 256), 4, 128, "bfloat16", 0, 0),
]
NOT_THERE = [
    Fp8Layout((64, 96), 32, 32, "float8_e5m2", "float32"),
    Fp8Layout((64, 96), 32, 32, "float8_e4m3fn", "uint8"),
    CompressedLayout((30, 128), 8, 32, "bfloat16", 0, 0),
    CompressedLayout((32, 128), 4, 32, "bfloat16", 1, 0),
    CompressedLayout((30, 128), 4, 32, "float16", 0, 0),
    CompressedLayout((30, 80), 4, 32, "bfloat16", 0, 0),
    AwqLayout((48, 96), 32, "float16"),
]


@pytest.fixture(scope="module")
def decoders() -> Decoders:
    found = load_decoders()
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
        else:
            data = torch.randint(0, 256, (part.bytes,), dtype=torch.uint8, generator=random)
            data = data.clamp(max=250) if part.name == "scale" else data
            parts.append(data.view(part.dtype).view(part.shape))
    return PackedMatrix(layout, tuple(parts))


def by_torch(matrix: PackedMatrix, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(matrix.layout.shape, dtype=dtype)
    matrix.layout.decode(matrix.parts, out)
    return out


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.spec} {layout.shape}")
def test_the_same_bits(
    decoders: Decoders, layout: PackedLayout, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "_SMALL", 0)
    matrix = random_matrix(layout)
    out = torch.full(layout.shape, 7, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert decoders.decode(matrix, out)
    finally:
        torch.set_num_threads(before)
    expected = by_torch(matrix, dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(3).view(torch.uint8), expected.nan_to_num(3).view(torch.uint8))


@pytest.mark.parametrize("layout", NOT_THERE, ids=lambda layout: f"{layout.spec} {layout.shape}")
def test_the_rest_is_left_to_torch(decoders: Decoders, layout: PackedLayout) -> None:
    matrix = random_matrix(layout)
    assert not decoders.decode(matrix, torch.empty(layout.shape, dtype=torch.bfloat16))
    found = Decoder(decoders).decode(PackedParameter((matrix, matrix)), torch.bfloat16)
    half = by_torch(matrix, torch.bfloat16)
    assert torch.equal(found.nan_to_num(), torch.cat([half, half]).nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_left_to_torch(decoders: Decoders, dtype: torch.dtype) -> None:
    matrix = random_matrix(LAYOUTS[0])
    assert not decoders.decode(matrix, torch.empty(matrix.layout.shape, dtype=dtype))
    transposed = torch.empty(matrix.layout.shape[::-1], dtype=torch.float32).t()
    assert not decoders.decode(matrix, transposed)


def test_memory_is_used_again() -> None:
    decoder = Decoder(load_decoders())
    large, small = (PackedParameter((random_matrix(layout),)) for layout in LAYOUTS[:2])
    first = decoder.decode(large, torch.bfloat16)
    second = decoder.decode(small, torch.bfloat16)
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(second.nan_to_num(), by_torch(random_matrix(LAYOUTS[1]), torch.bfloat16).nan_to_num())
