"""How the dense FFN is cut: the sizes that recipe, build and distillation share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CarveShape:
    """`ffn` neurons of each layer = `shared` + `experts` * `expert_size`; a token uses shared + `top_k` experts."""

    layers: int
    hidden: int
    ffn: int
    shared: int
    experts: int
    expert_size: int
    top_k: int

    def __post_init__(self) -> None:
        if min(self.layers, self.hidden, self.ffn, self.shared, self.experts, self.expert_size, self.top_k) < 1:
            raise ValueError(f"every size of a carve shape must be at least 1: {self}")
        if self.shared + self.experts * self.expert_size != self.ffn:
            raise ValueError(
                f"shared {self.shared} + {self.experts} x {self.expert_size} neurons are not the layer's {self.ffn}"
            )
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than the {self.experts} experts")

    @property
    def active_share(self) -> float:
        """Share of the FFN's neurons that one token uses."""
        return (self.shared + self.top_k * self.expert_size) / self.ffn
