"""Published layouts: decoded values equal the reference dequantisation's bit for bit, and what is damaged or unknown is
refused in one line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from offload.checkpoint.formats.awq import AwqLayout
from offload.checkpoint.formats.bitsandbytes import BitsAndBytesLayout
from offload.checkpoint.formats.compressed import CompressedLayout
from offload.checkpoint.formats.fp8 import Fp8Layout
from offload.checkpoint.formats.gptq import GptqLayout
from offload.checkpoint.formats.methods import LAYOUTS, METHODS, get_method, parse_layout
from offload.checkpoint.formats.mxfp4 import Mxfp4Layout
from offload.checkpoint.formats.nvfp4 import Nvfp4Layout
from offload.checkpoint.formats.packed import Entry, PackedLayout, PackedTensor
from offload.checkpoint.source import open_source
from offload.errors import ModelError
from tests.checkpoint.packs import write_pack
from tests.published_models import build_published

LAYOUT_EXAMPLES: list[PackedLayout] = [
    Fp8Layout((48, 80), 32, 32, "float8_e4m3fn", "float32"),
    Fp8Layout((48, 80), 48, 80, "float8_e5m2", "bfloat16"),
    Fp8Layout((48, 80), 1, 80, "float8_e4m3fn", "uint8"),
    Mxfp4Layout((48, 96), 0),
    Mxfp4Layout((64, 40), 1),
    Nvfp4Layout((48, 80), 0),
    Nvfp4Layout((48, 96), 1),
    CompressedLayout((48, 96), 4, 32, "bfloat16", 0, 0),
    CompressedLayout((48, 80), 8, 32, "float16", 1, 0),
    GptqLayout((48, 96), 4, 3, "float16", 1, 0),
    GptqLayout((48, 80), 8, 2, "bfloat16", 0, 0),
    AwqLayout((48, 96), 32, "float16"),
    BitsAndBytesLayout((48, 80), 64, 0),
    BitsAndBytesLayout((48, 50), 64, 16),
]


def random_bytes(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def decode(layout: PackedLayout, parts: tuple[torch.Tensor, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    out = torch.full(layout.shape, torch.nan, dtype=dtype)
    layout.decode(parts, out)
    return out


def example_parts(layout: PackedLayout) -> tuple[torch.Tensor, ...]:
    """Bytes of every value, but no NaNs in what are scales."""
    parts = []
    for number, part in enumerate(layout.parts):
        if part.dtype in (torch.float32, torch.bfloat16, torch.float16):
            parts.append(torch.rand(part.shape, generator=torch.Generator().manual_seed(number)).to(part.dtype))
        else:
            parts.append(random_bytes((part.bytes,), number).view(part.dtype).view(part.shape))
    return tuple(parts)


@pytest.mark.parametrize("layout", LAYOUT_EXAMPLES, ids=lambda layout: layout.spec)
def test_the_manifest_names_a_layout(layout: PackedLayout) -> None:
    assert parse_layout(layout.spec, layout.shape) == layout
    assert LAYOUTS[layout.kind] is type(layout)
    assert all(offset % 64 == 0 for offset in layout.offsets)
    assert layout.bytes >= sum(part.bytes for part in layout.parts)
    with pytest.raises(ValueError, match="does not describe"):
        parse_layout(f"{layout.kind}:colour=7", layout.shape)


def test_a_plain_dtype_is_no_layout() -> None:
    assert parse_layout("bfloat16", (3, 4)) is None


@pytest.mark.parametrize("layout", LAYOUT_EXAMPLES, ids=lambda layout: layout.spec)
def test_rows_alone_decode_as_in_the_whole(layout: PackedLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = example_parts(layout)
    whole = decode(layout, parts, torch.float32)
    for rows in (slice(None), slice(0, 1), slice(5, 37), slice(32, 48)):
        assert torch.equal(layout.decode_rows(parts, rows, torch.float32).nan_to_num(), whole[rows].nan_to_num())
    monkeypatch.setattr("offload.checkpoint.formats.packed._BLOCK", 700)
    assert torch.equal(decode(layout, parts, torch.float32).nan_to_num(), whole.nan_to_num())
    assert torch.equal(layout.decode_rows(parts, slice(3, 40), torch.float32).nan_to_num(), whole[3:40].nan_to_num())


# --- FP8 ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(1, 1), (4, 2), (2, 5), (16, 1)]),
    st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.float8_e8m0fnu]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 9),
)
def test_fp8_as_transformers(
    grid: tuple[int, int], kind: torch.dtype, scale_dtype: torch.dtype, dtype: torch.dtype, seed: int
) -> None:
    weight = random_bytes((16, 40), seed).view(kind)
    if scale_dtype.is_floating_point and scale_dtype.itemsize > 1:
        scale = torch.rand(grid, generator=torch.Generator().manual_seed(seed)).to(scale_dtype)
    else:
        scale = (random_bytes(grid, seed) % 20 + 117).view(scale_dtype)
    said = [str(t).removeprefix("torch.") for t in (kind, scale_dtype)]
    layout = Fp8Layout((16, 40), 16 // grid[0], 40 // grid[1], *said)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=dtype)
    assert torch.equal(decode(layout, (weight, scale), dtype).nan_to_num(), expected.nan_to_num())


# --- MXFP4 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_as_transformers(dtype: torch.dtype) -> None:
    blocks, scales = random_bytes((3, 40, 2, 16)), random_bytes((3, 40, 2)).clamp(2, 250)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    layout = Mxfp4Layout((64, 40), 1)
    for expert in range(3):
        parts = blocks[expert].view(40, 32), scales[expert]
        assert torch.equal(decode(layout, parts, dtype), expected[expert])
        assert torch.equal(decode(Mxfp4Layout((40, 64), 0), parts, dtype), expected[expert].t())


def test_four_bit_experts_of_an_fp8_checkpoint() -> None:
    """As DeepSeek-V4 has them; transformers reads them in the same way."""
    weight, scale = (
        random_bytes((40, 32)).view(torch.int8),
        (random_bytes((40, 2)) % 20 + 117).view(torch.float8_e8m0fnu),
    )
    entries = {
        "experts.0.w1.weight": Entry(torch.int8, (40, 32)),
        "experts.0.w1.scale": Entry(torch.float8_e8m0fnu, (40, 2)),
        "other": Entry(torch.int8, (40, 32)),
    }
    found = METHODS["fp8"]({}).find(entries, lambda key: torch.empty(0))
    assert found.keys() == {"experts.0.w1.weight"}
    layout, keys, experts, _ = found["experts.0.w1.weight"]
    assert (layout, keys, experts) == (Mxfp4Layout((40, 64), 0), ("experts.0.w1.weight", "experts.0.w1.scale"), None)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=torch.bfloat16)
    parts = weight.view(torch.uint8), scale.view(torch.uint8)
    assert torch.equal(decode(layout, parts), expected)


# --- NVFP4 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("divides", "whole"), [(0, 0.25), (1, 4.0)])
def test_nvfp4_by_hand(divides: int, whole: float) -> None:
    """Low halves come first, a scale is for 16, and the matrix's own number divides or multiplies."""
    codes = torch.zeros(2, 16, dtype=torch.uint8)
    codes[0, 0], codes[0, 7], codes[0, 8], codes[1, 15] = 0x21, 0xF0, 0x9E, 0x7C
    scales = torch.tensor([[0x38, 0x40], [0x01, 0xB8]], dtype=torch.uint8).view(torch.float8_e4m3fn)  # 1 2, 2^-9 -1
    expected = torch.zeros(2, 32)
    expected[0, 0], expected[0, 1], expected[0, 15] = 0.5, 1, -6
    expected[0, 16], expected[0, 17] = 2 * -4, 2 * -0.5
    expected[1, 30], expected[1, 31] = -1 * -2, -1 * 6
    found = decode(Nvfp4Layout((2, 32), divides), (codes, scales, torch.tensor([whole])), torch.float32)
    assert torch.equal(found, expected / 4)
    codes[1, 0] = 1
    found = decode(Nvfp4Layout((2, 32), divides), (codes, scales, torch.tensor([whole])), torch.float32)
    assert found[1, 0] == 0.5 * 2**-9 / 4


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("divides", [0, 1])
def test_nvfp4_scales_that_are_no_numbers(divides: int, code: int) -> None:
    layout = Nvfp4Layout((4, 32), divides)
    codes, scales, whole = example_parts(layout)
    scales = torch.full_like(scales.view(torch.uint8), 0x38).view(torch.float8_e4m3fn)
    assert layout.finite((codes, scales, whole))
    assert not layout.finite((codes, scales, torch.tensor([torch.nan])))
    assert layout.finite((codes, scales, torch.tensor([0.0]))) is not bool(divides)
    scales.view(torch.uint8)[3, 1] = code
    assert not layout.finite((codes, scales, whole))


def test_both_names_of_nvfp4() -> None:
    parts = {
        "scale": Entry(torch.float8_e4m3fn, (40, 4)),
        "whole": Entry(torch.float32, ()),
        "codes": Entry(torch.uint8, (40, 32)),
    }
    entries = {"q.weight": parts["codes"], "q.weight_scale": parts["scale"], "q.weight_scale_2": parts["whole"]}
    fp8 = {
        "k.weight": Entry(torch.float8_e4m3fn, (40, 64)), "k.weight_scale": Entry(torch.float32, ()),
        "k.input_scale": Entry(torch.float32, ()), "q.input_scale": Entry(torch.float32, ()),
        "v.weight": Entry(torch.float8_e4m3fn, (40, 64)), "v.weight_scale": Entry(torch.uint8, (40, 2)),
    }  # fmt: skip
    found = METHODS["modelopt"]({"quant_algo": "MIXED_PRECISION"}).find(entries | fp8, lambda key: torch.empty(0))
    assert found == {
        "q.weight": PackedTensor(Nvfp4Layout((40, 64), 0), ("q.weight", "q.weight_scale", "q.weight_scale_2")),
        "k.weight": PackedTensor(
            Fp8Layout((40, 64), 40, 64, "float8_e4m3fn", "float32"), ("k.weight", "k.weight_scale")
        ),
        "v.weight": PackedTensor(Fp8Layout((40, 64), 1, 32, "float8_e4m3fn", "uint8"), ("v.weight", "v.weight_scale")),
    }
    entries = {
        "q.weight_packed": parts["codes"], "q.weight_scale": parts["scale"],
        "q.weight_global_scale": Entry(torch.float32, (1,)), "q.input_global_scale": Entry(torch.float32, (1,)),
    }  # fmt: skip
    found = METHODS["compressed-tensors"]({"format": "nvfp4-pack-quantized"}).find(entries, lambda key: torch.empty(0))
    keys = ("q.weight_packed", "q.weight_scale", "q.weight_global_scale")
    assert found == {"q.weight": PackedTensor(Nvfp4Layout((40, 64), 1), keys)}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q.weight_scale_2": None}, r"the NVFP4 tensor q.weight has no scales \(q.weight_scale_2\); download"),
        ({"q.weight_scale": None}, r"the NVFP4 tensor q.weight has no scales \(q.weight_scale\); download"),
        ({"q.weight_scale": Entry(torch.float8_e4m3fn, (40, 2))}, r"the scales q.weight_scale \[40, 2\] do not fit"),
        (
            {"q.weight_scale": Entry(torch.uint8, (40, 4))},
            "the scales q.weight_scale .* do not fit the weights q.weight",
        ),
        ({"q.weight_scale_2": Entry(torch.float32, (40,))}, r"the scales q.weight_scale_2 \[40\] do not fit"),
        ({"q.weight": Entry(torch.uint8, (3, 40, 32))}, r"the NVFP4 tensor q.weight \[3, 40, 32\] is no matrix, which"),
        ({"q.pre_quant_scale": Entry(torch.float32, (64,))}, "q.pre_quant_scale scales inputs, which is not supported"),
        (
            {
                "experts.up": Entry(torch.uint8, (3, 40, 32)),
                "experts.up_weight_scale": Entry(torch.float8_e4m3fn, (3, 40, 4)),
            },
            "the modelopt tensor experts.up holds all experts of a layer, which is not supported; use another",
        ),
    ],
)
def test_nvfp4_that_cannot_be_read(change: dict[str, Entry | None], match: str) -> None:
    whole = {
        "q.weight": Entry(torch.uint8, (40, 32)), "q.weight_scale": Entry(torch.float8_e4m3fn, (40, 4)),
        "q.weight_scale_2": Entry(torch.float32, ()),
    }  # fmt: skip
    entries = {key: entry for key, entry in (whole | change).items() if entry is not None}
    with pytest.raises(ModelError, match=match):
        METHODS["modelopt"]({}).find(entries, lambda key: torch.empty(0))


@pytest.mark.parametrize(
    ("config", "spec"),
    [
        ({"quant_algo": "NVFP4"}, "nvfp4:divides=0"),
        ({"quant_algo": "w4a16_nvfp4"}, "nvfp4:divides=0"),
        ({"quant_algo": "FP8"}, "fp8:block_rows=40,block_columns=64,weight=float8_e4m3fn,scale=float32"),
        ({"quant_algo": "MIXED_PRECISION"}, None),
        (
            {
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"a.q_proj": {"quant_algo": "FP8"}, "a.experts.0.up": {"quant_algo": "NVFP4"}},
            },
            "nvfp4:divides=0",
        ),
        (
            {
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"quantized_layers": {"a.experts": {"quant_algo": "FP8"}}},
            },
            "fp8:block_rows=40,block_columns=64,weight=float8_e4m3fn,scale=float32",
        ),
    ],
)
def test_what_modelopt_lets_expect(config: dict[str, Any], spec: str | None) -> None:
    found = METHODS["modelopt"](config).predict((40, 64), torch.bfloat16, False)
    assert (None if found is None else found.spec) == spec


# --- compressed-tensors ---------------------------------------------------------------------------------------------


def test_compressed_fp8_with_a_scale_for_each_row() -> None:
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    method = METHODS["compressed-tensors"]({"format": "float-quantized", "config_groups": {"a": {"weights": weights}}})
    entries = {
        "q.weight": Entry(torch.float8_e4m3fn, (40, 32)),
        "q.weight_scale": Entry(torch.bfloat16, (40, 1)),
        "norm.weight": Entry(torch.bfloat16, (32,)),
    }
    found = method.find(entries, lambda key: torch.empty(0))
    layout = Fp8Layout((40, 32), 1, 32, "float8_e4m3fn", "bfloat16")
    assert found == {"q.weight": PackedTensor(layout, ("q.weight", "q.weight_scale"))}


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
            "'mxfp4-pack-quantized' is not supp",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"},
            "modelopt quant_algo 'NVFP4_AWQ' is not supported; these",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 3, "type": "int"}}}},
            "weights of 3 bits are not supported; 4 or 8",
        ),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ weights of 3 bits are not supported; 4 or 8 are"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "'marlin' is not supported; gptq and gptq_v2 are"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv' are not supported; 4 bits in gemm are"),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "weights of 8 bits are not supported; those of 4 bits",
        ),
    ],
)
def test_variants_that_are_not_supported(config: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        get_method(config)


# --- refusals -------------------------------------------------------------------------------------------------------

EXPERT = "model.layers.1.mlp.experts.2.up_proj"
Change = Callable[[dict[str, torch.Tensor]], Any]


def damaged(format_name: str, folder: Path, change: Change) -> Path:
    """A published checkpoint with some of its tensors changed."""
    published = build_published(format_name, folder).published
    tensors = load_file(published / "model.safetensors")
    change(tensors)
    save_file(tensors, published / "model.safetensors")
    return published


def refused(folder: Path, match: str, format_name: str = "native") -> None:
    with pytest.raises(ModelError, match=match) as caught:
        write_pack(open_source(folder), folder.with_name("pack"), format_name=format_name)
    assert "\n" not in str(caught.value)
    assert not folder.with_name("pack").exists()


def test_fp8_without_scales(tmp_path: Path) -> None:
    folder = damaged("fp8", tmp_path, lambda t: t.pop("model.layers.1.mlp.experts.0.up_proj.weight_scale_inv"))
    refused(folder, "the FP8 tensor .*experts.0.up_proj.weight has no scales .*weight_scale_inv")


def test_fp8_with_scales_of_another_shape(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv"
    folder = damaged("fp8", tmp_path, lambda t: t.update({name: torch.ones(3, 5)}))
    refused(folder, r"the scales .*up_proj.weight_scale_inv \[3, 5\] do not fit the weights")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_fp8_with_scales_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.experts.3.up_proj.weight_scale_inv"
    folder = damaged("fp8", tmp_path, lambda t: t[name].fill_(value))
    refused(folder, "layer 2, expert 3 has scales that are not finite: the checkpoint is damaged")
    refused(folder, "layer 2, expert 3 has weights that are not finite", "int4")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("model.layers.0.mlp.experts.down_proj_scales"), r"down_proj_blocks has no scales \(.*_scales"),
        (
            lambda t: t.update(
                {"model.layers.0.mlp.experts.down_proj_scales": torch.zeros(8, 64, 2, dtype=torch.uint8)}
            ),
            r"down_proj_scales \[8, 64, 2\] do not fit the weights",
        ),
        (
            lambda t: t["model.layers.0.mlp.experts.down_proj_scales"][5].fill_(255),
            "layer 0, expert 5 has scales that are not finite",
        ),
    ],
)
def test_mxfp4_with_damaged_scales(change: Change, match: str, tmp_path: Path) -> None:
    refused(damaged("mxfp4", tmp_path, change), match)


@pytest.mark.parametrize(
    ("format_name", "change", "match"),
    [
        ("compressed int4", lambda t: t.pop(f"{EXPERT}.weight_scale"), "weight_packed has no scales"),
        ("compressed int4", lambda t: t.update({f"{EXPERT}.weight_scale": torch.ones(3, 2)}), "do not fit the weights"),
        ("gptq", lambda t: t.pop(f"{EXPERT}.qzeros"), "qweight has no .*qzeros; download the checkpoint again"),
        ("gptq", lambda t: t.update({f"{EXPERT}.qzeros": torch.ones(3, 2)}), "qzeros .* does not fit the weights"),
        ("awq", lambda t: t.pop(f"{EXPERT}.scales"), "qweight has no .*scales; download the checkpoint again"),
        ("awq", lambda t: t.update({f"{EXPERT}.scales": torch.ones(5, 2)}), "scales .* does not fit the weights"),
        ("nf4", lambda t: t.pop(f"{EXPERT}.weight.absmax"), "has no .*weight.absmax; download the checkpoint again"),
        ("nf4", lambda t: t[f"{EXPERT}.weight.quant_state.bitsandbytes__nf4"].fill_(65), "nf4 is damaged"),
        ("nf4", lambda t: t.update({f"{EXPERT}.weight.absmax": torch.ones(5)}), "absmax .* does not fit the weights"),
        (
            "nvfp4",
            lambda t: t.pop(f"{EXPERT}.weight_scale_2"),
            "has no scales .*weight_scale_2.; download the checkpoint",
        ),
        (
            "nvfp4",
            lambda t: t[f"{EXPERT}.weight_scale"].view(torch.uint8)[3].fill_(0x7F),
            "layer 1, expert 2 has scales that are not finite",
        ),
        (
            "nf4",
            lambda t: t[f"{EXPERT}.weight.nested_absmax"].fill_(torch.nan),
            "layer 1, expert 2 has scales that are",
        ),
    ],
)
def test_damaged_parts(format_name: str, change: Change, match: str, tmp_path: Path) -> None:
    refused(damaged(format_name, tmp_path, change), match)


def test_experts_that_are_not_all_quantised(tmp_path: Path) -> None:
    """Ours can still be made of them."""

    def plain(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.mlp.experts.5.up_proj.weight"
        tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.bfloat16)
        del tensors[f"{name}_scale_inv"]

    folder = damaged("fp8", tmp_path, plain)
    refused(folder, "not all quantised in one way, .* use --format int8 or int4")
    write_pack(open_source(folder), tmp_path / "other", format_name="int8")


def test_every_method_has_a_name() -> None:
    assert all(method.name == name for name, method in METHODS.items())
    assert len({method.name for method in METHODS.values()}) == len(METHODS)
