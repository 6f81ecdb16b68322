"""Where the carving starts: which neurons are shared, which stand together in an expert, and a first router.

Neurons that fire often and strongly are shared (the activation rate over ATopK of CMoE, Pei et al. 2025, plus the
energy of outliers); the others are grouped by their activation profiles with a balanced k-means (MoEfication, Zhang
et al. 2022); the router is a linear fit to each expert's share of the activation energy among the best top_k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from offload.demo.shape import CarveShape

LOGIT_SPREAD = 0.05  # the router's logits get this standard deviation: softmax weights stay near 1 / experts


@dataclass
class LayerStart:
    """`order` int64 `[ffn]`, `router` float32 `[experts, hidden]`, shares of the routed energy that top_k keeps."""

    order: Tensor
    router: Tensor
    kept: float
    kept_best: float


def balanced_kmeans(features: Tensor, groups: int, size: int, rounds: int = 8, seed: int = 0) -> Tensor:
    """Assign `groups * size` unit rows of `features` to groups of exactly `size` by cosine; int64 `[rows]`.

    In each round the rows that are surest of their first choice choose first.
    """
    rows = features.shape[0]
    centres = features[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:groups]].clone()
    groups_of = torch.full((rows,), -1, dtype=torch.long)
    for _ in range(rounds):
        likeness = features @ centres.T
        best = likeness.topk(2, 1).values
        room, chosen = [size] * groups, torch.empty(rows, dtype=torch.long)
        wishes = likeness.argsort(1, descending=True).tolist()
        for row in (best[:, 0] - best[:, 1]).argsort(descending=True).tolist():
            group = next(g for g in wishes[row] if room[g])
            room[group] -= 1
            chosen[row] = group
        if torch.equal(chosen, groups_of):
            break
        groups_of = chosen
        centres = F.normalize(torch.zeros_like(centres).index_add_(0, groups_of, features), dim=1)
    return groups_of


def fit_router(
    x: Tensor, target: Tensor, steps: int = 80, rate: float = 0.02, batch: int = 3072, seed: int = 0
) -> Tensor:
    """Fit a linear softmax classifier from `x` `[tokens, hidden]` to `target` distributions `[tokens, experts]`."""
    scale = x.pow(2).mean().sqrt()
    weight = torch.zeros(target.shape[1], x.shape[1], requires_grad=True)
    optimiser = torch.optim.Adam([weight], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(0, x.shape[0], (batch,), generator=generator)
            loss = -(target[rows] * F.linear(x[rows] / scale, weight).log_softmax(-1)).sum(-1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return (weight / scale).detach()


def start_layer(x: Tensor, inner: Tensor, down: Tensor, residual: Tensor, shape: CarveShape) -> LayerStart:
    """Carve one layer.

    `x` is the FFN's input `[tokens, hidden]`, `inner` silu(gate) * up `[tokens, ffn]` in the dense order, `down`
    `[hidden, ffn]`, `residual` the stream that the output is added to; tokens count by 1 / its norm, or the few with
    huge activations would decide everything. All float32.
    """
    active = int(shape.ffn * shape.active_share)
    strength = inner * down.float().norm(dim=0) / residual.norm(dim=1, keepdim=True)
    energy = strength.pow(2)
    rate = (strength.abs() >= strength.abs().topk(active, -1).values[:, -1:]).float().mean(0)
    by_worth = (rate + energy.mean(0) / energy.mean(0).max()).argsort(descending=True)
    shared, routed = by_worth[: shape.shared].sort().values, by_worth[shape.shared :]
    profiles = F.normalize(strength[:: max(1, len(x) // 6000)][:, routed].abs().T, dim=1)
    profiles = F.normalize(profiles - profiles.mean(0, keepdim=True), dim=1)
    groups = balanced_kmeans(profiles, shape.experts, shape.expert_size)
    order = routed[groups.argsort(stable=True)]
    per_expert = energy[:, order].view(-1, shape.experts, shape.expert_size).sum(-1)
    best, ids = per_expert.topk(shape.top_k, -1)
    target = torch.zeros_like(per_expert).scatter_(1, ids, best.sqrt())
    router = fit_router(x, target / target.sum(-1, keepdim=True))
    logits = F.linear(x, router)
    router = (router - router.mean(0)) * (LOGIT_SPREAD / (logits - logits.mean(-1, keepdim=True)).std())
    chosen = F.linear(x, router).topk(shape.top_k, -1).indices
    total = per_expert.sum()
    return LayerStart(
        order=torch.cat([shared, order]),
        router=router,
        kept=float(per_expert.gather(1, chosen).sum() / total),
        kept_best=float(best.sum() / total),
    )
