"""Norms in one call: what is replaced gives the model code's figures, and what is another thing stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offload.compute.kernels import Kernels
from offload.model.norms import FusedNorm, fuse_norms


class RoundFirst(nn.Module):
    """Llama's norm, and most others'."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width).to(dtype) + 0.5)
        self.variance_epsilon = 1e-5

    def normed(self, states: torch.Tensor) -> torch.Tensor:
        states = states.float()
        return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.weight * self.normed(states).to(states.dtype)


class RoundLastNorm(RoundFirst):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return (self.weight.float() * self.normed(states)).to(states.dtype)


class OnePlusNorm(RoundFirst):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return (self.normed(states) * (1 + self.weight.float())).to(states.dtype)


class RoundFirstNorm(RoundFirst):
    pass


class AlmostNorm(RoundFirst):
    """Has a norm's parts and name, and does something else."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states) * 1.05


class GatedNorm(RoundFirst):
    def forward(self, states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(states) if gate is None else super().forward(states) * gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [RoundFirstNorm, RoundLastNorm, OnePlusNorm])
@pytest.mark.parametrize("width", [7, 16, 128, 700])
def test_replaced_and_equal(cls: type[RoundFirst], dtype: torch.dtype, width: int, kernels: Kernels) -> None:
    torch.manual_seed(0)
    norm = cls(width, dtype)
    model = nn.ModuleDict({"inner": nn.ModuleDict({"norm": norm})})
    assert fuse_norms(model, kernels) == 1  # type: ignore[arg-type]
    fused = model["inner"]["norm"]
    assert isinstance(fused, FusedNorm)
    assert fused.weight is norm.weight
    for states in (torch.randn(1, 1, width), torch.randn(2, 5, width) * 30, torch.randn(3, width, 4).transpose(1, 2)):
        states = states.to(dtype)
        with torch.inference_mode():
            torch.testing.assert_close(fused(states), norm(states))
            assert not fused(torch.zeros_like(states)).any()


def test_states_of_another_dtype(kernels: Kernels) -> None:
    norm = RoundFirstNorm(32, torch.bfloat16)
    model = nn.ModuleDict({"norm": norm})
    assert fuse_norms(model, kernels) == 1  # type: ignore[arg-type]
    states = torch.randn(3, 32)
    assert torch.equal(model["norm"](states), norm(states))


@pytest.mark.parametrize("cls", [AlmostNorm, GatedNorm, nn.LayerNorm])
def test_others_stay(cls: type[nn.Module], kernels: Kernels) -> None:
    other = nn.LayerNorm(32) if cls is nn.LayerNorm else cls(32, torch.float32)
    model = nn.ModuleDict({"norm": other})
    assert fuse_norms(model, kernels) == 0  # type: ignore[arg-type]
    assert model["norm"] is other
