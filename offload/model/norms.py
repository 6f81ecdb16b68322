"""Root mean square norms in one call each, for runs whose weights are quantised anyway.

The model code makes eight small tensors for a norm. The kernel sums in another order, so runs in the native format keep
the model code.
"""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel

from offload.compute.kernels import Kernels

_WAYS = (0, 1, 2)  # of offload.compute.kernels.Kernels.rms_norm
_CLOSE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


class FusedNorm(torch.nn.Module):
    """Stands for ``module``, a norm over the last dimension, and shares its ``weight``.

    States of another dtype than the weight's, which some families have, still go through the module.
    """

    def __init__(self, module: torch.nn.Module, epsilon: float, way: int, kernels: Kernels) -> None:
        super().__init__()
        self.weight = module.weight
        self.epsilon = epsilon
        self.way = way
        self._kernels = kernels
        self.__dict__["_module"] = module  # not a submodule: its weight is here already

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., width] -> the same."""
        if hidden_states.dtype != self.weight.dtype:
            result: torch.Tensor = self.__dict__["_module"](hidden_states)
            return result
        hidden_states = hidden_states.contiguous()
        output = self._kernels.states.empty(hidden_states.shape, hidden_states.dtype)
        self._kernels.rms_norm(hidden_states, self.weight, self.epsilon, self.way, output)
        return output

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, way {self.way}"


@torch.inference_mode()
def fuse_norms(model: PreTrainedModel, kernels: Kernels) -> int:
    """Replace every norm of ``model`` that proves to be one of those that the kernel makes; returns how many.

    A name is only a hint: a module is replaced if it gives the kernel's figures for random input. Changes ``model``.
    """
    replaced = 0
    for path, module in list(model.named_modules()):
        fused = _fused(module, kernels)
        if fused is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, fused)
            replaced += 1
    return replaced


def _fused(module: torch.nn.Module, kernels: Kernels) -> FusedNorm | None:
    weight = module._parameters.get("weight")
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    only = set(module._parameters) == {"weight"} and not module._buffers and not module._modules
    hooked = module._forward_hooks or module._forward_pre_hooks
    if not only or hooked or weight is None or weight.dim() != 1 or weight.dtype not in _CLOSE or epsilon is None:
        return None
    if "Norm" not in type(module).__name__ or len(inspect.signature(module.forward).parameters) != 1:
        return None
    probe = torch.randn(3, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    probe[1] *= 1e-3  # small enough for epsilon to count
    expected = module(probe)
    for way in _WAYS:
        fused = FusedNorm(module, float(epsilon), way, kernels)
        found = fused(probe)
        if expected.dtype == found.dtype and expected.shape == found.shape:
            error = (found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1e-30)
            if error.max() <= _CLOSE[weight.dtype]:
                return fused
    return None
