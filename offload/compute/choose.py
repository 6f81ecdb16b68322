"""Which code computes a weight format on a device."""

from __future__ import annotations

from offload.checkpoint.formats import NativeFormat, WeightFormat
from offload.compute.base import ExpertCompute
from offload.compute.kernels.published import Decoders
from offload.compute.native_experts import NativeExperts
from offload.compute.product import Products
from offload.compute.quantized_experts import QuantizedExperts
from offload.model.transformers_api import gates_with_silu


def expert_compute(weight_format: WeightFormat, products: Products, decoders: Decoders | None = None) -> ExpertCompute:
    """For the CPU, the only device so far. ``decoders`` are for the packed weights of a native format."""
    if isinstance(weight_format, NativeFormat):
        return NativeExperts(decoders)
    return QuantizedExperts(products, gates_with_silu)
