from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from offload.demo.distil.cluster import LOGIT_SPREAD, balanced_kmeans, start_layer
from offload.demo.distil.locality import lru_hit_rate, overlap, popularity
from offload.demo.distil.loss import head_kl, stream_distance
from offload.demo.distil.prompts import HELD_OUT, PROBES, training_prompts
from offload.demo.distil.student import gates
from tests.demo import tiny


def test_groups_are_balanced_and_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(4, 16, generator=generator), dim=1)
    truth = torch.arange(32) % 4
    groups = balanced_kmeans(F.normalize(centres[truth] + 0.05 * torch.randn(32, 16, generator=generator), dim=1), 4, 8)
    assert torch.bincount(groups, minlength=4).tolist() == [8, 8, 8, 8]
    assert sum(len(set(groups[truth == group].tolist())) == 1 for group in range(4)) >= 2


def test_start_of_a_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    x, down = torch.randn(400, 32, generator=generator), torch.randn(32, 48, generator=generator)
    inner = F.relu(x @ torch.randn(32, 48, generator=generator))
    start = start_layer(x, inner, down, 1 + x.abs(), tiny.shape(2))
    assert sorted(start.order.tolist()) == list(range(48))
    assert 0.5 < start.kept <= start.kept_best < 1
    spread = F.linear(x, start.router)
    assert float((spread - spread.mean(-1, keepdim=True)).std()) == pytest.approx(LOGIT_SPREAD, rel=0.05)


def test_head_kl_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher, head = (torch.randn(size, 8, generator=generator) for size in (10, 10, 30))
    student.requires_grad_(True)
    loss = head_kl(student, teacher, head, piece=4)
    loss.backward()
    fused, student.grad = student.grad, None
    log_p, log_q = (F.linear(x, head).log_softmax(-1) for x in (teacher, student))
    plain = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    plain.backward()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(fused, student.grad, atol=1e-5, rtol=1e-4)


def test_stream_distance() -> None:
    assert float(stream_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]))) == 0.25


def test_unselected_experts_get_a_gradient() -> None:
    router = torch.randn(4, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    gate, ids = gates(x, router, tiny.shape(2), tau=0.5)
    assert (gate > 0).sum(-1).tolist() == [2] * 5
    left_out = torch.ones_like(gate).scatter(-1, ids, 0.0)
    (gate * left_out).sum().backward()
    assert router.grad is not None and float(router.grad.abs().sum()) > 0


def test_prompts_are_apart() -> None:
    prompts = training_prompts()
    assert len(prompts) == len(set(prompts)) > 600
    assert not set(prompts) & set(PROBES + HELD_OUT)
    assert not set(PROBES) & set(HELD_OUT)


def test_locality_by_hand() -> None:
    ids = torch.tensor([[[[0, 1], [1, 2], [1, 2]]]])  # one layer, one sequence, three tokens
    assert overlap(ids, 4).tolist() == pytest.approx([0.75])
    assert popularity(ids, 4)[0].tolist() == pytest.approx([4 / 6, 2.0, 4 / 3, 0.0])
    assert lru_hit_rate(ids[:, 0], slots=2) == pytest.approx(3 / 6)
    assert lru_hit_rate(ids[:, 0], slots=4) == pytest.approx(3 / 6)
    assert lru_hit_rate(torch.tensor([[[0, 1], [0, 1]]]), slots=1) == pytest.approx(1 / 4)
