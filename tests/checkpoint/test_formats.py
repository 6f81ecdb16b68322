"""Record layouts: tensors are aligned, apart from each other and inside the record, and come back bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.checkpoint.formats import FORMATS, get_format
from offload.checkpoint.formats.base import TENSOR_ALIGNMENT
from offload.checkpoint.manifest import RECORD_ALIGNMENT
from offload.errors import UsageError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn)
NAMES = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias", "up_proj")
TENSORS = st.dictionaries(
    st.sampled_from(NAMES),
    st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple), st.sampled_from(DTYPES)),
    min_size=1,
)


@given(TENSORS)
def test_layout(specs: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    layout = get_format("native").layout(specs)
    end = 0
    for tensor in layout.tensors:
        shape, dtype = specs[tensor.name]
        assert tensor.offset % TENSOR_ALIGNMENT == 0
        assert tensor.offset >= end
        assert (tensor.shape, tensor.bytes) == (shape, torch.empty(shape, dtype=dtype).nbytes)
        assert getattr(torch, tensor.dtype) == dtype
        end = tensor.offset + tensor.bytes
    assert {tensor.name for tensor in layout.tensors} == specs.keys()
    assert layout.record_bytes % RECORD_ALIGNMENT == 0
    assert end <= layout.record_bytes < end + RECORD_ALIGNMENT
    assert layout == get_format("native").layout(dict(reversed(specs.items()))), "the order of the names plays no role"


@given(TENSORS, st.integers(0, 2**31))
def test_tensors_come_back_bit_for_bit(specs: dict[str, tuple[tuple[int, ...], torch.dtype]], seed: int) -> None:
    native = get_format("native")
    layout = native.layout(specs)
    random = torch.Generator().manual_seed(seed)

    def noise(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = torch.empty(shape, dtype=dtype).nbytes
        return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=random).view(dtype).view(shape)

    tensors = {name: noise(*spec) for name, spec in specs.items()}
    record = torch.full((layout.record_bytes + 64,), 0xAA, dtype=torch.uint8)
    native.encode(layout, tensors, record)
    views = native.views(layout, record)
    assert views.keys() == tensors.keys()
    covered = torch.zeros(len(record), dtype=torch.bool)
    for place in layout.tensors:
        view, tensor = views[place.name], tensors[place.name]
        assert (view.shape, view.dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(view.contiguous().view(torch.uint8), tensor.view(torch.uint8)), "NaNs and all"
        assert view.data_ptr() == record.data_ptr() + place.offset, "a view, not a copy"
        covered[place.offset : place.offset + place.bytes] = True
    assert (record[~covered] == 0xAA).all(), "nothing else is touched"


def test_wrong_shape_is_not_broadcast() -> None:
    native = get_format("native")
    layout = native.layout({"up_proj": ((4, 8), torch.float32)})
    with pytest.raises(ValueError, match=r"up_proj has shape \(1, 8\) instead of \(4, 8\)"):
        native.encode(layout, {"up_proj": torch.zeros(1, 8)}, torch.zeros(layout.record_bytes, dtype=torch.uint8))


def test_names() -> None:
    assert all(weight_format.name == name for name, weight_format in FORMATS.items())
    with pytest.raises(UsageError, match="--format: 'int3' is not one of native"):
        get_format("int3")
