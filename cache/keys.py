"""The name of an expert."""

from __future__ import annotations

from typing import NamedTuple


class ExpertKey(NamedTuple):
    """Routed expert ``expert`` of MoE layer ``layer`` (the decoder layer's number, not a count of MoE layers)."""

    layer: int
    expert: int
