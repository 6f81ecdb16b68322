"""Which code computes a weight format, and what it computes with on the CPU."""

from __future__ import annotations

from collections.abc import Callable

from offload.checkpoint.formats import NativeFormat, WeightFormat, get_format
from offload.checkpoint.source import CheckpointSource
from offload.compute.base import ExpertCompute
from offload.compute.calibration import crossover
from offload.compute.grouped import GroupedKernels
from offload.compute.grouped_experts import GroupedExperts
from offload.compute.kernels import load_kernels
from offload.compute.kernels.published import PublishedKernels, load_published
from offload.compute.native_experts import NativeExperts
from offload.compute.product import Products
from offload.compute.quantized_experts import QuantizedExperts
from offload.config import EngineSettings
from offload.devices.base import Device
from offload.events import LoadProgress, Notice
from offload.model.transformers_api import gates_with_silu

OnEvent = Callable[[LoadProgress | Notice], None]


def expert_compute(
    weight_format: WeightFormat,
    products: Products,
    published: PublishedKernels | None = None,
    grouped: GroupedKernels | None = None,
) -> ExpertCompute:
    """``grouped``: the kernels of a device that has them for this format. Without them, ``products`` multiplies
    quantised weights, and ``published`` are for the packed weights of a native format.
    """
    if grouped is not None:
        return GroupedExperts(grouped, native=isinstance(weight_format, NativeFormat))
    if isinstance(weight_format, NativeFormat):
        return NativeExperts(published)
    return QuantizedExperts(products, gates_with_silu)


def products_for_cpu(settings: EngineSettings, on_event: OnEvent) -> Products:
    """What multiplies quantised weights on the CPU; compiles its kernels if this machine has none yet."""
    if settings.kernels == "torch" or (settings.format, settings.dense_format) == ("native", "native"):
        return Products(None, 0)

    def failed(why: str) -> None:
        on_event(Notice(f"quantised weights are multiplied by torch alone, many times slower: {why}"))

    kernels = load_kernels(failed)
    return Products(kernels, crossover(kernels, on_event))


def published_for_cpu(settings: EngineSettings, source: CheckpointSource, on_event: OnEvent) -> PublishedKernels | None:
    """What decodes packed weights on the CPU; compiled if this machine has none yet."""
    if settings.kernels == "torch" or source.method is None or settings.format != "native":
        return None

    def failed(why: str) -> None:
        on_event(Notice(f"packed weights are decoded by torch alone, several times slower: {why}"))

    return load_published(failed)


def grouped_kernels(
    settings: EngineSettings, device: Device, source: CheckpointSource, on_event: OnEvent
) -> GroupedKernels | None:
    """What multiplies with many experts at once; compiled for the card if it was not yet."""
    weight_format = get_format(settings.format)
    if settings.kernels == "torch" or (source.method is not None and weight_format.published):
        return None

    def failed(why: str) -> None:
        on_event(Notice(f"experts are multiplied by torch, one after the other, since the card's kernels fail: {why}"))

    return device.grouped_kernels(weight_format, source.dtype, failed)
