"""The compiled kernels, or None where they cannot be had: then torch does the work, several times slower."""

from __future__ import annotations

from offload.compute.kernels.binding import Kernels, load_kernels

__all__ = ["Kernels", "load_kernels"]
