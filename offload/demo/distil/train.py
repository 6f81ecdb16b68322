"""The distillation: starting point, trained parameters, the loop with its checkpoints."""

from __future__ import annotations

import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from offload.demo.distil.cluster import start_layer
from offload.demo.distil.loss import head_kl, stream_distance
from offload.demo.distil.student import Carved, _norm
from offload.demo.gguf_dense import DenseModel
from offload.demo.shape import CarveShape

RANKS = {"qkv": 16, "o": 16, "gate_up": 40, "down": 32}
# Adam's step for each kind of parameter; the router's is in units of its own root mean square.
RATES = {"lora": 1e-3, "norm": 5e-4, "scale": 2e-3, "router": 4e-3}
Layer = dict[str, Tensor]


def starting_point(dense: DenseModel, shape: CarveShape, rows: Tensor) -> dict[str, Any]:
    """Carve every layer on the activations of the dense model; see `cluster.py`. `rows` are token ids for calibration.

    Returns `{"order": int64 [layers, ffn], "params": one dict for each layer}`.
    """
    carved = Carved(dense, shape, torch.arange(shape.ffn).repeat(shape.layers, 1), rows.shape[1])
    generator = torch.Generator().manual_seed(0)
    order, params = [], []
    x = carved.embedding[rows].float()
    for index, frozen in enumerate(carved.layers):
        residual = carved.attention(index, x, None)
        h = _norm(residual, frozen.norm2, dense.config.norm_eps)
        gate, up = F.linear(h, frozen.gate_up).chunk(2, -1)
        inner = F.silu(gate) * up
        flat = (h.float().flatten(0, 1), inner.float().flatten(0, 1), frozen.down.float(), residual.flatten(0, 1))
        start = start_layer(*flat, shape)
        x = residual + F.linear(inner, frozen.down)
        order.append(start.order)
        layer = {"norm1": frozen.norm1.clone(), "norm2": frozen.norm2.clone(), "router": start.router}
        layer["scale"] = torch.ones(shape.ffn)
        for name, rank in RANKS.items():
            rows_out, columns_in = getattr(frozen, name).shape
            layer[name + "_a"] = torch.randn(rank, columns_in, generator=generator) / math.sqrt(columns_in)
            layer[name + "_b"] = torch.zeros(rows_out, rank)
        params.append(layer)
        print(
            f"layer {index}: the router keeps {start.kept:.3f} of the routed energy, {start.kept_best:.3f} at best",
            flush=True,
        )
    return {"order": torch.stack(order), "params": params}


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a kill leaves the old one or the new one."""
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


class _Batches:
    """Rows of two sources in turn, each shuffled anew when it is used up."""

    def __init__(self, text: Tensor, chat: Tensor, seed: int) -> None:
        self.sources, self.queues = (text, chat), ([], [])  # type: tuple[Tensor, Tensor], tuple[list[int], list[int]]
        self.generator = torch.Generator().manual_seed(seed)

    def next(self, counts: tuple[int, int]) -> Tensor:
        rows = []
        for source, queue, count in zip(self.sources, self.queues, counts, strict=True):
            for _ in range(count):
                if not queue:
                    queue += torch.randperm(len(source), generator=self.generator).tolist()
                rows.append(source[queue.pop()])
        return torch.stack(rows)


def distil(
    carved: Carved,
    params: list[Layer],
    text: Tensor,
    chat: Tensor,
    seconds: float,
    checkpoint: Path,
    state: dict[str, Any],
    batch: tuple[int, int] = (1, 1),
    save_every: int = 60,
    seed: int = 1,
    rate: float = 1.0,
) -> None:
    """Train `params` in place for `seconds` of wall time on `batch` = (text rows, chat rows) a step.

    Loss: KL at the output plus a share, falling from 1 to 0.1, of the mean residual-stream distance of every second
    layer. Adam at `rate` times `RATES`, warm-up of 10 steps, cosine over the time. A checkpoint is written every
    `save_every` steps.
    """
    groups: dict[str, list[Tensor]] = {kind: [] for kind in RATES}
    routers = [float(layer["router"].pow(2).mean().sqrt()) for layer in params]
    for layer, size in zip(params, routers, strict=True):
        layer["router"] = layer["router"] / size
        for name, tensor in layer.items():
            groups["norm" if name.startswith("norm") else name if name in RATES else "lora"].append(tensor)
            tensor.requires_grad_(True)
    leaves = [tensor for kind in groups.values() for tensor in kind]
    optimiser = torch.optim.Adam([{"params": groups[k], "lr": RATES[k]} for k in RATES], betas=(0.9, 0.98))
    batches, started, step, tokens, recent = _Batches(text, chat, seed), time.monotonic(), 0, 0, [0.0, 0.0]
    while (share := (time.monotonic() - started) / seconds) < 1:
        factor = rate * min(1.0, (step + 1) / 10) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        for group, base in zip(optimiser.param_groups, RATES.values(), strict=True):
            group["lr"] = base * factor
        rows = batches.next(batch)
        if step % 4:  # attention is a fifth of the time at 512 tokens; half as long rows do for most steps
            rows = rows.view(-1, rows.shape[1] // 2)
        streams: list[Tensor] = []
        with torch.no_grad():
            last = carved.forward(rows, None, each=partial(_keep_odd, streams))
            teacher = carved.head_input(last).flatten(0, 1)
        distances: list[Tensor] = []
        scaled = [layer | {"router": layer["router"] * size} for layer, size in zip(params, routers, strict=True)]
        last = carved.forward(rows, scaled, tau=0.5, each=partial(_compare_odd, streams, distances))
        kl = head_kl(carved.head_input(last).flatten(0, 1), teacher, carved.embedding)
        distance = torch.stack(distances).mean()
        optimiser.zero_grad()
        (kl + (1 - 0.9 * share) * distance).backward()
        norm = torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimiser.step()
        step, tokens = step + 1, tokens + rows.numel()
        keep = 0.95 if step > 20 else 1 - 1 / step
        now = (float(kl.detach()), float(distance.detach()))
        recent = [keep * old + (1 - keep) * new for old, new in zip(recent, now, strict=True)]
        if step % 10 == 0 or step < 4:
            seconds_in = time.monotonic() - started
            print(
                f"{step} {seconds_in:.0f} s {tokens} tokens KL {recent[0]:.4f} distance {recent[1]:.4f} "
                f"gradient {norm:.2f}",
                flush=True,
            )
        if step % save_every == 0:
            save_state(checkpoint, state | {"params": _finished(params, routers), "step": step, "tokens": tokens})
    save_state(checkpoint, state | {"params": _finished(params, routers), "step": step, "tokens": tokens})


def _keep_odd(streams: list[Tensor], index: int, x: Tensor, _: Any) -> None:
    if index % 2:
        streams.append(x)


def _compare_odd(streams: list[Tensor], distances: list[Tensor], index: int, x: Tensor, _: Any) -> None:
    if index % 2:
        distances.append(stream_distance(x, streams[index // 2]))


def _finished(params: list[Layer], routers: list[float]) -> list[Layer]:
    return [
        {name: (tensor * size if name == "router" else tensor).detach().clone() for name, tensor in layer.items()}
        for layer, size in zip(params, routers, strict=True)
    ]
