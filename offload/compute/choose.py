"""Which code computes a weight format on a device."""

from __future__ import annotations

from offload.checkpoint.formats import NativeFormat, WeightFormat
from offload.compute.base import ExpertCompute
from offload.compute.grouped import GroupedKernels
from offload.compute.grouped_experts import GroupedExperts
from offload.compute.kernels.published import Decoders
from offload.compute.native_experts import NativeExperts
from offload.compute.product import Products
from offload.compute.quantized_experts import QuantizedExperts
from offload.model.transformers_api import gates_with_silu


def expert_compute(
    weight_format: WeightFormat,
    products: Products,
    decoders: Decoders | None = None,
    grouped: GroupedKernels | None = None,
) -> ExpertCompute:
    """``grouped``: the kernels of a device that has them for this format. Without them, ``products`` multiplies
    quantised weights, and ``decoders`` are for the packed weights of a native format.
    """
    if grouped is not None:
        return GroupedExperts(grouped, native=isinstance(weight_format, NativeFormat))
    if isinstance(weight_format, NativeFormat):
        return NativeExperts(decoders)
    return QuantizedExperts(products, gates_with_silu)
