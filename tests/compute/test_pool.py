"""The kernels' threads: every part of the work is done once, whoever comes late, and whoever else computes."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from offload.compute.kernels import Kernels
from offload.compute.matrix import MatrixLayout, QuantizedMatrix, decode, empty_matrix
from offload.compute.threads import OneThread


def matrix(rows: int = 600) -> QuantizedMatrix:
    made = empty_matrix(MatrixLayout.make(rows, 256, 4))
    made.codes.random_(0, 256, generator=torch.Generator().manual_seed(0))
    made.params.copy_(torch.rand(made.params.shape, generator=torch.Generator().manual_seed(1)))
    return made


def product(kernels: Kernels, weights: QuantizedMatrix, inputs: torch.Tensor) -> torch.Tensor:
    output = torch.full((len(inputs), weights.layout.rows), torch.nan)
    job = (weights.codes.data_ptr(), weights.params.data_ptr(), 0, len(inputs))
    kernels.linear(weights.layout.shape, [job], inputs, output)
    return output


@pytest.fixture
def many_threads(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    monkeypatch.setattr(kernels, "threads", 7)
    return kernels


def test_the_same_again_and_again(many_threads: Kernels) -> None:
    weights, inputs = matrix(), torch.randn(3, 256)
    first = product(many_threads, weights, inputs)
    torch.testing.assert_close(first, inputs @ decode(weights, torch.float32, None).t(), atol=1e-3, rtol=1e-4)
    for _ in range(2000):
        assert torch.equal(product(many_threads, weights, inputs), first)


def test_several_callers_at_a_time(many_threads: Kernels) -> None:
    weights = matrix()
    expected = {n: product(many_threads, weights, torch.full((n, 256), float(n))) for n in range(1, 5)}
    wrong: list[int] = []

    def call(n: int) -> None:
        for _ in range(200):
            if not torch.equal(product(many_threads, weights, torch.full((n, 256), float(n))), expected[n]):
                wrong.append(n)

    callers = [threading.Thread(target=call, args=(n,)) for n in expected]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not wrong
    assert not any(caller.is_alive() for caller in callers)


def test_after_a_fork(many_threads: Kernels) -> None:
    """A child has none of its parent's threads, and must not wait for them."""
    weights, inputs = matrix(), torch.ones(1, 256)
    expected = product(many_threads, weights, inputs)
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(product(many_threads, weights, inputs), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_one_thread_gives_back_what_was() -> None:
    before = torch.get_num_threads(), torch.backends.mkldnn.enabled
    few = OneThread()
    for _ in range(2):
        with few:
            assert (torch.get_num_threads(), torch.backends.mkldnn.enabled) == (1, False)
        assert (torch.get_num_threads(), torch.backends.mkldnn.enabled) == before
    with OneThread(keeps_library=True):
        assert (torch.get_num_threads(), torch.backends.mkldnn.enabled) == (1, before[1])
    with pytest.raises(KeyError), few:
        raise KeyError
    assert (torch.get_num_threads(), torch.backends.mkldnn.enabled) == before
