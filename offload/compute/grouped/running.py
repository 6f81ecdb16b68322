"""Running launches of the grouped kernels with Triton."""

from __future__ import annotations

from typing import Any

import torch

from offload.compute.grouped.launches import Launch


class GroupedKernels:
    """Launches on the current stream of ``device``. Raises ImportError where Triton is missing.

    In Triton's interpreter (``TRITON_INTERPRET=1`` when Triton is first imported) ``device`` may be the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        import triton

        from offload.compute.grouped import kernels

        self.device = device
        self.interpreted = not isinstance(kernels.multiply_row, triton.JITFunction)
        self._kernels = kernels

    def run(self, launch: Launch) -> None:
        """Changes the output named in the launch."""
        arguments = {name: self._constant(name, value) for name, value in launch.arguments.items()}
        getattr(self._kernels, launch.kernel)[launch.grid](**arguments, **launch.options)

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` from the CPU to the device; the CPU does not wait for the copy."""
        pinned = values.pin_memory() if self.device.type == "cuda" else values
        return pinned.to(self.device, non_blocking=True)

    def _constant(self, name: str, value: Any) -> Any:
        if not isinstance(value, torch.dtype):
            return value
        if self.interpreted and name == "FACTORS" and value is torch.bfloat16:
            value = torch.float32
        return self._kernels.dtype(value)
