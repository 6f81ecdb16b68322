"""All experts of an event that are ready in one launch for each product, on a CUDA card: Triton's part is in
``kernels.py``, which is imported only where it is used."""

from __future__ import annotations

from offload.compute.grouped.loading import load_grouped
from offload.compute.grouped.running import GroupedKernels

__all__ = ["GroupedKernels", "load_grouped"]
