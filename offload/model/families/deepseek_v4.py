"""DeepSeek V4: in the first layers a table says which experts a token takes, so a token's loads can begin with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from offload.model.transformers_api import ExpertsModule

Foretell = Callable[[int, list[int]], None]
"""Told a layer's number and the experts that the token under way will take there."""


def foretell_by_tokens(model: torch.nn.Module, modules: Sequence[ExpertsModule], foretell: Foretell) -> bool:
    """Tell ``foretell`` at the start of each pass over a single token what the tables say, in the order of the layers.

    Returns whether the model has such tables; if not, nothing is changed.
    """
    tables: list[tuple[int, torch.nn.Module]] = []
    for found in sorted(modules, key=lambda found: found.layer):
        block = model.get_submodule(found.path.rpartition(".")[0])
        tables += [(found.layer, router) for router in block.children() if "tid2eid" in router._buffers]
    if not tables:
        return False

    def begin(module: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        tokens = options.get("input_ids", args[0] if args else None)
        if tokens is None or tokens.numel() != 1:
            return
        for layer, router in tables:
            chosen: torch.Tensor = router.tid2eid[tokens.reshape(-1)]  # type: ignore[index]
            foretell(layer, chosen[0].tolist())

    model.register_forward_pre_hook(begin, with_kwargs=True)
    return True
