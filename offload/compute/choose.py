"""Which code computes a weight format on a device."""

from __future__ import annotations

from offload.checkpoint.formats import NativeFormat, WeightFormat
from offload.compute.base import ExpertCompute
from offload.compute.native_experts import NativeExperts
from offload.compute.product import Products
from offload.compute.quantized_experts import QuantizedExperts
from offload.model.transformers_api import gates_with_silu


def expert_compute(weight_format: WeightFormat, products: Products) -> ExpertCompute:
    """For the CPU, the only device so far."""
    if isinstance(weight_format, NativeFormat):
        return NativeExperts()
    return QuantizedExperts(products, gates_with_silu)
