"""What the finished checkpoint is worth: perplexity against the dense model, routing, plain questions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from offload.demo.distil.locality import lru_hit_rate, overlap, popularity


@dataclass(frozen=True)
class Quality:
    """Perplexities over the same tokens, the mean KL(dense || carved) in nats, the share of equal first choices."""

    dense: float
    carved: float
    kl: float
    agreement: float

    @property
    def ratio(self) -> float:
        """Carved perplexity in units of the dense one's."""
        return self.carved / self.dense


@torch.inference_mode()
def quality(dense: Any, carved: Any, rows: Tensor) -> Quality:
    """Compare two transformers models on token ids `[rows, tokens]`, row by row, every token but the first."""
    loss = [0.0, 0.0]
    kl = same = 0.0
    count = 0
    for row in rows:
        logs = [model(row[None]).logits[0, :-1].float().log_softmax(-1) for model in (dense, carved)]
        for which, log in enumerate(logs):
            loss[which] += float(F.nll_loss(log, row[1:], reduction="sum"))
        kl += float((logs[0].exp() * (logs[0] - logs[1])).sum())
        same += float((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
        count += len(row) - 1
    return Quality(math.exp(loss[0] / count), math.exp(loss[1] / count), kl / count, same / count)


@torch.inference_mode()
def routing(carved: Any, rows: Tensor) -> Tensor:
    """Return the selected experts of a Qwen2-MoE model, int64 `[layers, rows, tokens, top_k]`."""
    seen: list[list[Tensor]] = [[] for _ in carved.model.layers]
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _m, _i, out, into=into: into.append(out[-1]))
        for layer, into in zip(carved.model.layers, seen, strict=True)
    ]
    try:
        for row in rows:
            carved.model(row[None])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([torch.stack(layer) for layer in seen])


def report_routing(ids: Tensor, experts: int) -> str:
    """Return the lines that describe the routing of `ids` (see `routing`)."""
    near, liked = overlap(ids, experts), popularity(ids, experts)
    chance = (liked / experts * ids.shape[-1]).pow(2).sum(-1).mean() / ids.shape[-1]
    lines = [
        f"  overlap of consecutive tokens {near.mean():.3f} (layers {near.min():.2f} to {near.max():.2f}); uniform "
        f"routing {ids.shape[-1] / experts:.3f}, the experts' popularity alone {chance:.3f}",
        f"  popularity, mean over layers: most used {liked.max(-1).values.mean():.2f} x, least used "
        f"{liked.min(-1).values.mean():.2f} x the uniform share",
    ]
    for residency in (0.25, 0.5, 0.75):
        slots = int(experts * residency)
        rate = sum(lru_hit_rate(ids[:, row], slots) for row in range(ids.shape[1])) / ids.shape[1]
        lines.append(
            f"  LRU hit rate at {residency:.0%} residency ({slots} of {experts} a layer, cold start): {rate:.3f}"
        )
    return "\n".join(lines)


@torch.inference_mode()
def ask(model: Any, tokenizer: Any, question: str, new_tokens: int = 60) -> str:
    """Return the model's greedy answer to one question, asked through the chat template."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    text: str = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def load_checkpoint(folder: Path) -> tuple[Any, Any]:
    """Return (model in bf16, tokenizer) of the demo folder through stock transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16)
    return model.eval(), AutoTokenizer.from_pretrained(str(folder))
