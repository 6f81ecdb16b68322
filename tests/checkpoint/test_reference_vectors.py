"""GPTQ, AWQ and NVFP4 against the libraries that write them: matrices that they packed, and what they make of those.

``gptq-awq.safetensors`` was made once by AutoGPTQ 0.7.1 (``qlinear_cuda``: ``pack`` and the product with a unit matrix)
and AutoAWQ 0.2.9 (``dequantize_gemm``) on the CPU. AutoGPTQ's product of 8 bits overflows there, so of those it has the
weights that went in. ``nvfp4.safetensors`` was made once by compressed-tensors 0.20.0 (``NVFP4PackedCompressor``) and
NVIDIA's modelopt 0.47.0 (``NVFP4QTensor``), both with their own decoders, from bfloat16 weights.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from offload.checkpoint.formats.awq import AwqMethod
from offload.checkpoint.formats.compressed import CompressedMethod
from offload.checkpoint.formats.gptq import GptqMethod
from offload.checkpoint.formats.method import Method
from offload.checkpoint.formats.modelopt import ModelOptMethod
from offload.checkpoint.formats.packed import Entry

DATA = Path(__file__).parents[1] / "data"
TENSORS = load_file(DATA / "gptq-awq.safetensors")
NVFP4 = load_file(DATA / "nvfp4.safetensors")


def decoded(
    name: str, method: Method, tensors: dict[str, torch.Tensor] = TENSORS, dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    """The weights [outputs, inputs] of the packed tensor ``name``, found as in a checkpoint."""
    entries = {
        key: Entry(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items() if key.startswith(f"{name}.")
    }
    found = method.find(entries, tensors.__getitem__)[f"{name}.weight"]
    out = torch.empty(found.layout.shape, dtype=dtype)
    parts = (tensors[key].reshape(part.shape) for key, part in zip(found.keys, found.layout.parts, strict=True))
    found.layout.decode(tuple(parts), out)
    return out


@pytest.mark.parametrize("name", ["gptq4", "gptq4-order"])
def test_gptq_of_4_bits(name: str) -> None:
    assert torch.equal(decoded(name, GptqMethod({"bits": 4})), TENSORS[f"{name}.weight"])


def test_gptq_of_8_bits() -> None:
    off = (decoded("gptq8", GptqMethod({"bits": 8})).float() - TENSORS["gptq8.weight"].float()).abs()
    step = TENSORS["gptq8.scales"].float()[TENSORS["gptq8.g_idx"].long()].t()
    assert (off <= 0.6 * step).all(), "half a step, and the rounding of weights to 16 bits"


def test_gptq_zero_points_that_need_no_one_more() -> None:
    """GPTQModel says ``gptq`` of symmetric weights and writes 8 for what version 1 has as 7."""
    plain = TENSORS | {"gptq4.qzeros": torch.full_like(TENSORS["gptq4.qzeros"], 0x77777777)}
    newer = TENSORS | {"gptq4.qzeros": torch.full_like(TENSORS["gptq4.qzeros"], 0x88888888 - 2**32)}
    method = GptqMethod({"bits": 4, "checkpoint_format": "gptq"})
    assert torch.equal(decoded("gptq4", method, plain), decoded("gptq4", method, newer))


def test_a_gptq_zero_point_does_not_touch_its_neighbour() -> None:
    zeros = TENSORS["gptq4.qzeros"].clone()
    zeros[0, 0] |= 0xF0
    method = GptqMethod({"bits": 4})
    changed = decoded("gptq4", method, TENSORS | {"gptq4.qzeros": zeros}) != decoded("gptq4", method)
    assert changed.any(1).nonzero().flatten().tolist() == [1]


def test_awq() -> None:
    assert torch.equal(decoded("awq", AwqMethod({"bits": 4})), TENSORS["awq.weight"])


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("modelopt", ModelOptMethod({"quant_algo": "NVFP4"})),
        ("compressed", CompressedMethod({"format": "nvfp4-pack-quantized"})),
    ],
)
def test_nvfp4(name: str, method: Method) -> None:
    found = decoded(name, method, NVFP4, torch.bfloat16)
    assert torch.equal(found, NVFP4[f"{name}.back"])
    assert not torch.equal(found, torch.zeros_like(found))
