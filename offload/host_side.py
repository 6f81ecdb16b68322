"""What computing misses on the CPU takes, beside a device with memory of its own: made when ``--miss`` first asks."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cache.misses import ExpertWork, MissPlanner
from offload.checkpoint.expert_file import ExpertFile
from offload.checkpoint.formats import get_format
from offload.checkpoint.source import CheckpointSource
from offload.compute.calibration import cpu_rates
from offload.compute.choose import OnEvent, expert_compute, products_for_cpu, published_for_cpu
from offload.config import EngineSettings
from offload.memory.storage import Storage
from offload.memory.tiers import TieredLoads
from offload.model.host_experts import HostExperts
from offload.model.transformers_api import ExpertsModule

NO_HOST_TIER = "there is no memory behind the slots where slots are RAM; --policy decides what stays"
NOTHING_TO_CHOOSE = "there is nothing to choose where slots are RAM; every miss is read and computed there"


def modules_on_host(modules: Sequence[ExpertsModule]) -> dict[int, Any]:
    """The experts modules by layer, before they go to the device: copies in host memory of those with weights left."""
    found: dict[int, Any] = {}
    for one in modules:
        module: Any = one.module
        if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
            module = copy.deepcopy(module).to("cpu")
        found[one.layer] = module
    return found


class HostSide:
    """Makes :class:`HostExperts` once and hands it out, under the strategy that is asked for."""

    def __init__(
        self,
        settings: EngineSettings,
        source: CheckpointSource,
        modules: Mapping[int, Any],
        storage: Storage,
        file: ExpertFile,
    ) -> None:
        self._settings = settings
        self._source = source
        self._modules = modules
        self._storage = storage
        self._file = file
        self._made: HostExperts | None = None

    def experts(self, strategy: str, on_event: OnEvent) -> HostExperts | None:
        """None for ``fetch``. The first call may compile kernels and measure rates."""
        if strategy == "fetch":
            return None
        if self._made is None:
            self._made = self._make(on_event)
        self._made.planner.strategy = strategy
        return self._made

    def close(self) -> None:
        if self._made is not None:
            self._made.passage.close()

    def _make(self, on_event: OnEvent) -> HostExperts:
        settings, source, loads = self._settings, self._source, self._storage.loads
        assert isinstance(loads, TieredLoads)
        products = products_for_cpu(settings, on_event)
        published = published_for_cpu(settings, source, on_event)
        weight_format = get_format(settings.format)
        rates = loads.miss_rates(lambda: cpu_rates(settings.format, products.kernels, on_event))
        hidden = source.config.get_text_config().hidden_size
        itemsize = source.dtype.itemsize
        product_size = itemsize if settings.format == "native" else torch.float32.itemsize
        work = {}
        for module in source.experts:
            weights = sum(math.prod(shape) for shape, _ in module.tensors.values() if len(shape) > 1)
            size = self._file.layout(module.layer).record_bytes
            work[module.layer] = ExpertWork(size, 2.0 * weights, hidden * itemsize, hidden * product_size)
        return HostExperts(
            MissPlanner(rates),
            self._storage.device.passage(),
            expert_compute(weight_format, products, published),
            self._modules,
            work,
            loads,
            self._file,
            weight_format,
        )
