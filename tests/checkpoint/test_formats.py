"""Record layouts: tensors are aligned, apart from each other and inside the record, and come back bit for bit, or with
no larger error than their bits demand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.checkpoint.formats import FORMATS, get_format, quantized
from offload.checkpoint.formats.base import TENSOR_ALIGNMENT
from offload.checkpoint.formats.quantized import matrix_layout, part_offsets
from offload.checkpoint.manifest import RECORD_ALIGNMENT
from offload.compute.matrix import QuantizedMatrix, decode
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


# --- quantised formats ----------------------------------------------------------------------------------------------

QUANTISED = {  # the layout of matrices and of down_proj, and the error that normally distributed weights may have
    "int8": ("int8", "int8", 0.0085),
    "int4": ("int4-g64", "int4-g64", 0.084),
    "int4-g32": ("int4-g32", "int4-g32", 0.072),
    "int4-g128": ("int4-g128", "int4-g128", 0.095),
    "mixed": ("int4-g64", "int8", 0.084),
}
EXPERTS: dict[str, dict[str, tuple[int, ...]]] = {
    "gated": {"gate_up_proj": (96, 64), "down_proj": (64, 48)},
    "biases": {"gate_up_proj": (96, 64), "gate_up_proj_bias": (96,), "down_proj": (64, 48), "down_proj_bias": (64,)},
    "no gate": {"up_proj": (200, 77), "down_proj": (77, 200)},
    "small": {"gate_up_proj": (2, 24), "down_proj": (24, 1)},
    "wide": {"gate_up_proj": (66, 640), "down_proj": (640, 33)},
}


def expert_weights(
    name: str, dtype: torch.dtype, transposed: tuple[str, ...] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors as an experts module holds them, and their specs."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for parameter, shape in EXPERTS[name].items():
        weight = torch.randn(shape, generator=generator)
        tensors[parameter] = (weight.t().contiguous() if parameter in transposed else weight).to(dtype)
    return tensors, {parameter: (tuple(tensor.shape), dtype) for parameter, tensor in tensors.items()}


@pytest.mark.parametrize("transposed", [(), ("down_proj", "up_proj")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_expert_round_trip(name: str, expert: str, dtype: torch.dtype, transposed: tuple[str, ...]) -> None:
    weight_format = get_format(name)
    matrices, down, bound = QUANTISED[name]
    tensors, specs = expert_weights(expert, dtype, transposed)
    layout = weight_format.layout(specs, transposed)
    assert layout == weight_format.layout(dict(reversed(specs.items())), transposed)
    record = torch.full((layout.record_bytes + 64,), 0xAA, dtype=torch.uint8)
    lost = weight_format.encode(layout, tensors, record, transposed)
    views = weight_format.views(layout, record)
    covered = torch.zeros(len(record), dtype=torch.bool)
    error = size = 0.0
    for tensor in layout.tensors:
        view, shape = views[tensor.name], EXPERTS[expert][tensor.name]
        assert tensor.offset % TENSOR_ALIGNMENT == 0
        assert not covered[tensor.offset : tensor.offset + tensor.bytes].any()
        covered[tensor.offset : tensor.offset + tensor.bytes] = True
        if not isinstance(view, QuantizedMatrix):
            assert len(shape) == 1, "vectors stand as they are"
            assert torch.equal(view, tensors[tensor.name])
            continue
        assert tensor.shape == shape, "outputs, inputs: whatever way the module has them"
        kept = matrices if tensor.name != "down_proj" else down
        if kept.startswith("int4"):  # of a matrix narrower than a group, the group is smaller
            kept = f"int4-g{min(int(kept[6:]), next((g for g in (32, 64, 128) if g >= shape[1]), 128))}"
        assert tensor.dtype == kept
        assert view.layout == matrix_layout(tensor)
        codes, params = part_offsets(tensor)
        assert params % TENSOR_ALIGNMENT == 0
        assert view.codes.data_ptr() == record.data_ptr() + codes, "a view, not a copy"
        assert view.params.data_ptr() == record.data_ptr() + params
        assert params + view.params.nbytes == tensor.offset + tensor.bytes
        exact = tensors[tensor.name].t() if tensor.name in transposed else tensors[tensor.name]
        decoded = decode(view, torch.float32, None)
        matrix_bound = 0.0085 if tensor.dtype == "int8" else bound
        assert (decoded - exact.float()).norm() < matrix_bound * 1.1 * exact.float().norm()
        error += (decoded.double() - exact.double()).square().sum().item()
        size += exact.double().square().sum().item()
    assert (record[layout.record_bytes :] == 0xAA).all()
    assert layout.record_bytes % RECORD_ALIGNMENT == 0
    assert layout.record_bytes - RECORD_ALIGNMENT < layout.tensors[-1].offset + layout.tensors[-1].bytes
    assert lost.relative == pytest.approx((error / size) ** 0.5, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_record_is_the_same_without_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_format = get_format(name)
    tensors, specs = expert_weights("wide", torch.bfloat16)
    layout = weight_format.layout(specs)
    records = torch.zeros(2, layout.record_bytes, dtype=torch.uint8)
    with_kernels = weight_format.encode(layout, tensors, records[0])
    monkeypatch.setattr(quantized, "load_kernels", lambda: None)
    without = weight_format.encode(layout, tensors, records[1])
    assert with_kernels.relative == pytest.approx(without.relative, rel=1e-3)
    assert (records[0] != records[1]).float().mean() < 0.01, "but for ties"


def test_quantised_wrong_shape() -> None:
    weight_format = get_format("int4")
    layout = weight_format.layout({"up_proj": ((8, 64), torch.float32)})
    record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"up_proj has shape \(64, 8\) instead of \(8, 64\)"):
        weight_format.encode(layout, {"up_proj": torch.zeros(64, 8)}, record)
    weight_format.encode(layout, {"up_proj": torch.zeros(64, 8)}, record, ["up_proj"])


def test_sizes_of_records() -> None:
    """Bits a weight of an expert of the usual size, scales and padding included."""
    specs = {"gate_up_proj": ((1536, 2048), torch.bfloat16), "down_proj": ((2048, 768), torch.bfloat16)}
    weights = 1536 * 2048 + 2048 * 768
    bits = {name: FORMATS[name].layout(specs).record_bytes * 8 / weights for name in FORMATS}
    assert bits["native"] == 16
    assert bits["int8"] == pytest.approx(8, abs=0.05)
    assert bits["int4"] == pytest.approx(4.5, abs=0.01)
    assert bits["int4-g32"] == pytest.approx(5, abs=0.01)
    assert bits["int4-g128"] == pytest.approx(4.25, abs=0.01)
    assert bits["mixed"] == pytest.approx((2 * 4.5 + 8) / 3, abs=0.05)
