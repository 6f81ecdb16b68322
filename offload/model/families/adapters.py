"""The families whose experts this project brings behind transformers' experts interface."""

from __future__ import annotations

from transformers import PreTrainedModel

from offload.model.families.base import Adapter
from offload.model.families.dbrx import DBRX
from offload.model.families.jetmoe import JETMOE
from offload.model.families.llama4 import LLAMA4
from offload.model.families.longcat_flash import LONGCAT_FLASH
from offload.model.families.step3p7 import STEP3P7
from offload.model.transformers_weights import add_conversions

ADAPTERS: dict[str, Adapter] = {adapter.stock: adapter for adapter in (DBRX, JETMOE, LLAMA4, LONGCAT_FLASH, STEP3P7)}


def adapt_experts(model: PreTrainedModel) -> None:
    """Replace the modules of a meta model that need it. Changes ``model``; most families have none."""
    config = model.config.get_text_config()
    used = set()
    for path, module in list(model.named_modules()):
        adapter = ADAPTERS.get(type(module).__name__)
        if adapter is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, adapter.make(module, config))
            used.add(adapter.stock)
    for name in sorted(used):
        add_conversions(model, ADAPTERS[name].conversions)
