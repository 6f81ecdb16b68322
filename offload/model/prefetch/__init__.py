"""What a prefetch goes by, by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cache.events import Events
from offload.model.prefetch.auto import AutoPrefetch
from offload.model.prefetch.base import Guess, Prefetcher
from offload.model.prefetch.foretold import Foretold
from offload.model.prefetch.next_gate import NextGate
from offload.model.prefetch.rows import RowGuesses
from offload.model.transformers_api import ExpertsModule

__all__ = ["Guess", "NextGate", "Prefetcher", "RowGuesses", "make_prefetcher"]


def make_prefetcher(
    name: str, model: torch.nn.Module, modules: Sequence[ExpertsModule], earlier: Events | None = None
) -> Prefetcher | None:
    """What ``--prefetch name`` goes by, once it has learned from ``earlier`` events; None for ``off``."""
    if name == "off":
        return None
    if name == "auto":
        return AutoPrefetch(model, modules, earlier)
    if name == "next-gate":
        return NextGate(model, modules)
    return Foretold(name, modules, earlier)
