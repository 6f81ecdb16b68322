"""Graphs in plain torch behave as those of a card, and what no graph can hold is noticed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cache.machines import load_machine
from offload.devices.clock import VirtualClock
from offload.devices.cuda_graphs import CudaGraphs
from offload.devices.graphs import Graph, GraphError, GraphRecorder, OperationWatch
from offload.devices.recorded import OperationRecorder, RecordedGraph
from offload.devices.simulated.graphs import SimGraphs
from offload.devices.simulated.tensor import Vram, World, made_on_device, register_device, to_device
from tests.fake_cuda import CPU, FakeCuda


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.inference_mode():
        yield


def recorded(work: Callable[[], Any], recorder: GraphRecorder | None = None) -> tuple[Graph, Any]:
    recorder = recorder or OperationRecorder()
    recorder.begin()
    try:
        result = work()
        return recorder.end(), result
    finally:
        recorder.abort()


def test_a_replay_computes_with_what_stands_in_the_same_tensors_now() -> None:
    given = torch.tensor([1.0, 2.0])
    graph, found = recorded(lambda: (given * 3 + 1).relu())
    assert found.tolist() == [4, 7]
    given.copy_(torch.tensor([10.0, -10.0]))
    graph.replay()
    assert found.tolist() == [31, 0]


def test_what_python_computed_stays_as_it_was() -> None:
    count = 1

    def work() -> torch.Tensor:
        return torch.zeros(2) + count

    graph, found = recorded(work)
    count = 5
    found.zero_()
    graph.replay()
    assert found.tolist() == [1, 1]


def test_views_and_writes_in_place_go_where_they_went() -> None:
    buffer = torch.zeros(2, 4)
    index = torch.tensor([1])

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.ones(1, 4) * index
        buffer.index_copy_(0, index, rows)
        doubled = buffer.mul(2)
        return doubled[1:].expand(3, 4), buffer[:, :2]

    graph, (wide, part) = recorded(work)
    assert wide.tolist() == [[2] * 4] * 3 and part.tolist() == [[0, 0], [1, 1]]
    index.fill_(0)
    buffer.zero_()
    graph.replay()
    assert buffer[0].tolist() == [0] * 4
    index.fill_(1)
    graph.replay()
    assert wide.tolist() == [[2] * 4] * 3 and part.data_ptr() == buffer.data_ptr()


def test_graphs_hand_tensors_on_and_keep_nothing_else() -> None:
    recorder = OperationRecorder()
    given = torch.arange(4.0)
    between: list[weakref.ref[torch.Tensor]] = []

    def first() -> torch.Tensor:
        gone = given + 1
        between.append(weakref.ref(gone))
        return gone.view(2, 2).sum(1)

    one, sums = recorded(first, recorder)
    assert between[0]() is None and isinstance(one, RecordedGraph)
    two, answer = recorded(lambda: sums * 10, recorder)
    given.zero_()
    one.replay()
    two.replay()
    assert answer.tolist() == [20, 20]


def test_a_tensor_that_a_graph_reads_must_stay() -> None:
    given = torch.ones(2)
    graph, found = recorded(lambda: given + 1)
    given = torch.ones(2)
    with pytest.raises(GraphError, match="a tensor that a graph reads is gone"):
        graph.replay()
    assert given.sum() + found.sum() == 6


WAITS: list[tuple[str, Callable[[torch.Tensor], Any]]] = [
    ("a value", lambda states: float(states[0])),
    ("a truth", lambda states: bool((states > 0).any())),
    ("a size", lambda states: states.nonzero()),
    ("what a mask selects", lambda states: states[states > 0]),
    ("the same, written", lambda states: states.index_put_((states > 0,), torch.arange(2.0))),
    ("a comparison", lambda states: torch.equal(states, states)),
]
GRAPHS = [
    ("a mask that fills", lambda states: states.masked_fill_(states > 0, 0.0)),
    ("one value by a mask", lambda states: states.index_put_((states > 0,), torch.tensor(1.0))),
    ("an index", lambda states: states[torch.tensor([0])]),
    ("top k", lambda states: states.topk(2)),
]


@pytest.mark.parametrize("work", [work for _, work in WAITS], ids=[name for name, _ in WAITS])
def test_the_host_must_not_wait(work: Callable[[torch.Tensor], Any]) -> None:
    states = torch.tensor([1.0, -1.0, 2.0])
    with OperationWatch(lambda tensor: tensor) as watch:
        work(states.clone())
    assert watch.waits is not None
    with pytest.raises(GraphError, match=r"the host waits for aten\."):
        recorded(lambda: work(states))
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


@pytest.mark.parametrize("work", [work for _, work in GRAPHS], ids=[name for name, _ in GRAPHS])
def test_what_a_graph_can_hold(work: Callable[[torch.Tensor], Any]) -> None:
    with OperationWatch(lambda tensor: tensor) as watch:
        work(torch.tensor([1.0, -1.0, 2.0]))
    assert watch.waits is None


def test_the_watch_counts_what_is_written() -> None:
    states = torch.ones(2, 2)
    with OperationWatch(lambda tensor: tensor) as watch:
        (states + 1).view(4)[:2].mul_(2)
        watch.paused = True
        states + 1
    assert watch.launches == 2


def test_a_copy_from_the_host_and_a_launch_on_the_pretend_gpu() -> None:
    register_device()
    clock = VirtualClock(load_machine("rtx4060"))
    world = World(Vram(2**20), clock)
    recorder = SimGraphs(clock)
    states = to_device(torch.ones(4), world)
    with made_on_device(world):
        with pytest.raises(GraphError, match=r"the host waits for aten\.to"):
            recorded(lambda: states + torch.tensor([1.0], device=states.device), recorder)
        graph, found = recorded(lambda: ((states + 1) * 2).sqrt().neg(), recorder)
        held, before = world.vram.used, clock.now
        graph.replay()
    assert clock.now - before == pytest.approx(clock.machine.launch_s), "four operations and one launch"
    assert found.elem.tolist() == [-2.0] * 4 and world.vram.used == held


def test_captures_of_a_card_run_beside_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    fake.install(monkeypatch)
    recorder = CudaGraphs(CPU, torch.bfloat16)
    recorder.prepare()
    stream = fake.log[-1][0] if fake.log[-1][1] == "enter" else ""
    given = torch.ones(2)
    one, half = recorded(lambda: given / 2, recorder)
    two, whole = recorded(lambda: half * 2, recorder)
    capture = (stream, "enter"), ("graph", "begins", "pool 1", "thread_local"), ("graph", "ends"), ("graph", "replays")
    assert fake.log[-8:] == [*capture, *capture], "both in one pool"
    given.fill_(8)
    one.replay()
    two.replay()
    assert (half.tolist(), whole.tolist()) == ([4, 4], [8, 8])
    recorder.prepare()
    recorder.begin()
    recorder.abort()
    assert fake.log[-2:] == [("graph", "begins", "pool 2", "thread_local"), ("graph", "ends")]
