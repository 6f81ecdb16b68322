"""Which code computes a weight format, and what it computes with on the CPU."""

from __future__ import annotations

from collections.abc import Callable

from offload.checkpoint.formats import NativeFormat, WeightFormat
from offload.checkpoint.source import CheckpointSource
from offload.compute.base import ExpertCompute
from offload.compute.calibration import crossover
from offload.compute.kernels import load_kernels
from offload.compute.kernels.published import Decoders, load_decoders
from offload.compute.native_experts import NativeExperts
from offload.compute.product import Products
from offload.compute.quantized_experts import QuantizedExperts
from offload.config import EngineSettings
from offload.events import LoadProgress, Notice
from offload.model.transformers_api import gates_with_silu

OnEvent = Callable[[LoadProgress | Notice], None]


def expert_compute(weight_format: WeightFormat, products: Products, decoders: Decoders | None = None) -> ExpertCompute:
    """``decoders`` are for the packed weights of a native format, on the CPU."""
    if isinstance(weight_format, NativeFormat):
        return NativeExperts(decoders)
    return QuantizedExperts(products, gates_with_silu)


def products_for_cpu(settings: EngineSettings, on_event: OnEvent) -> Products:
    """What multiplies quantised weights on the CPU; compiles its kernels if this machine has none yet."""
    if settings.kernels == "torch" or (settings.format, settings.dense_format) == ("native", "native"):
        return Products(None, 0)

    def failed(why: str) -> None:
        on_event(Notice(f"quantised weights are multiplied by torch alone, many times slower: {why}"))

    kernels = load_kernels(failed)
    return Products(kernels, crossover(kernels, on_event))


def decoders_for_cpu(settings: EngineSettings, source: CheckpointSource, on_event: OnEvent) -> Decoders | None:
    """What decodes packed weights on the CPU; compiled if this machine has none yet."""
    if settings.kernels == "torch" or source.method is None or settings.format != "native":
        return None

    def failed(why: str) -> None:
        on_event(Notice(f"packed weights are decoded by torch alone, several times slower: {why}"))

    return load_decoders(failed)
