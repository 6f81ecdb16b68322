"""Losses of the distillation: KL divergence at the output, and the distance of the residual streams on the way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _HeadKL(torch.autograd.Function):
    """Mean KL(teacher || student) over tokens, with the output head inside.

    Done in pieces that fit the cache, with the gradient computed on the way: the logits of a batch never exist at
    once (2 x 400 MB in float32 at 2,048 tokens).
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Tensor, piece: int) -> Tensor:
        grad = torch.empty_like(student)
        total = torch.zeros((), dtype=torch.float64)
        tokens = student.shape[0]
        for first in range(0, tokens, piece):
            part = slice(first, first + piece)
            log_p = F.linear(teacher[part], head).float().log_softmax(-1)
            log_q = F.linear(student[part], head).float().log_softmax(-1)
            p = log_p.exp()
            total += (p * log_p.sub_(log_q)).sum().double()
            grad[part] = log_q.exp_().sub_(p).to(head.dtype) @ head
        ctx.save_for_backward(grad.div_(tokens))
        return (total / tokens).float()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * outer[0].to(grad.dtype), None, None, None


def head_kl(student: Tensor, teacher: Tensor, head: Tensor, piece: int = 64) -> Tensor:
    """Return the mean KL divergence in nats of bf16 head inputs `[tokens, hidden]`, tied head `[vocab, hidden]`."""
    loss: Tensor = _HeadKL.apply(student, teacher, head, piece)
    return loss


def stream_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over tokens of |student - teacher|^2 / |teacher|^2 of two residual streams `[.., hidden]`."""
    return ((student - teacher).pow(2).sum(-1) / teacher.pow(2).sum(-1)).mean()
