"""A ``torch.cuda`` whose card is the CPU: streams and events write down what is asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from offload.devices.recorded import OperationRecorder

CPU = torch.device("cpu")


class FakeCuda:
    """Streams and events that write down what is asked of them."""

    def __init__(self) -> None:
        self.log: list[tuple[str, ...]] = []
        self.done = False
        self.registered: list[tuple[int, int]] = []
        self.refuse_pinning = False
        self.made = {"stream": 0, "event": 0, "pool": 0}
        fake = self

        class Stream:
            def __init__(self, device: Any = None) -> None:
                fake.made["stream"] += 1
                self.name = f"stream{fake.made['stream']}"

            def wait_event(self, event: Any) -> None:
                fake.log.append((self.name, "wait", event.name))

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                fake.made["event"] += 1
                self.name = f"event{fake.made['event']}"

            def record(self, stream: Any) -> None:
                fake.log.append((stream.name, "record", self.name))

            def query(self) -> bool:
                return fake.done

            def synchronize(self) -> None:
                fake.log.append(("host", "wait", self.name))

            def elapsed_time(self, other: Any) -> float:
                return 250.0

        class Runtime:
            @staticmethod
            def cudaHostRegister(address: int, size: int, flags: int) -> int:
                fake.registered.append((address, size))
                return 2 if fake.refuse_pinning else 0

            @staticmethod
            def cudaHostUnregister(address: int) -> int:
                fake.registered = [entry for entry in fake.registered if entry[0] != address]
                return 0

        class CUDAGraph:
            """Captures on the CPU run what they capture, so the replay that follows one has nothing left to do."""

            def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
                fake.log.append(("graph", "begins", f"pool {pool}", capture_error_mode))
                self.recorder = OperationRecorder()
                self.recorder.begin()

            def capture_end(self) -> None:
                fake.log.append(("graph", "ends"))
                if fake.refuse_captures:
                    self.recorder.abort()
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                self.graph = self.recorder.end()
                self.fresh = True

            def replay(self) -> None:
                fake.log.append(("graph", "replays"))
                if not self.fresh:
                    self.graph.replay()
                self.fresh = False

        def pool_handle() -> int:
            fake.made["pool"] += 1
            return fake.made["pool"]

        self.refuse_captures = False
        self.CUDAGraph, self.graph_pool_handle = CUDAGraph, pool_handle
        self.Stream, self.Event = Stream, Event
        self.kernels = Stream()
        self.kernels.name = "kernels"
        self.cudart = lambda: Runtime

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.log.append((stream.name, "enter"))
        yield

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("Stream", "Event", "stream", "cudart", "CUDAGraph", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.kernels)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda _, stream: self.log.append((stream.name, "keeps", "memory"))
        )
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.log.append(("host", "empty")))
