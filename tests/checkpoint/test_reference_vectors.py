"""GPTQ and AWQ against the libraries that wrote the formats: matrices that they packed, and what they make of them.

``gptq-awq.safetensors`` was made once by AutoGPTQ 0.7.1 (``qlinear_cuda``: ``pack`` and the product with a unit matrix)
and AutoAWQ 0.2.9 (``dequantize_gemm``) on the CPU. AutoGPTQ's product of 8 bits overflows there, so of those it has the
weights that went in.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from offload.checkpoint.formats.awq import AwqMethod
from offload.checkpoint.formats.gptq import GptqMethod
from offload.checkpoint.formats.method import Method
from offload.checkpoint.formats.packed import Entry

TENSORS = load_file(Path(__file__).parents[1] / "data" / "gptq-awq.safetensors")


def decoded(name: str, method: Method, tensors: dict[str, torch.Tensor] = TENSORS) -> torch.Tensor:
    """The weights [outputs, inputs] of the packed tensor ``name``, found as in a checkpoint."""
    entries = {
        key: Entry(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items() if key.startswith(f"{name}.")
    }
    found = method.find(entries, tensors.__getitem__)[f"{name}.weight"]
    out = torch.empty(found.layout.shape, dtype=torch.float16)
    found.layout.decode(tuple(tensors[key] for key in found.keys), out)
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
