"""How many threads torch uses while tokens are computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import NamedTuple

import torch


class OneThread:
    """While entered, torch's own operations run on one thread and, unless it ``keeps_library``, without oneDNN.

    For quantised weights. The kernels, which have threads of their own, do all large products there; what is left to
    torch are small tensors, for which waking a second thread takes longer than the work, the more so as the kernels'
    threads are then still looking for more, and torch's look for more beside the kernels. A router's product of a bf16
    matrix takes 17 microseconds for one token this way, 40 with oneDNN on an idle machine, and over 1000 with oneDNN
    beside the kernels' threads (docs/performance.md). For many tokens oneDNN is right. Can be entered again after it
    was left, not twice at a time.
    """

    def __init__(self, *, keeps_library: bool = False) -> None:
        self._keeps = keeps_library

    def __enter__(self) -> None:
        self._threads = torch.get_num_threads()
        self._library = torch.backends.mkldnn.enabled
        torch.set_num_threads(1)
        torch.backends.mkldnn.enabled = self._library and self._keeps

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_num_threads(self._threads)
        torch.backends.mkldnn.enabled = self._library


class TorchThreads(NamedTuple):
    """What surrounds passes that ``decode``, and the choice of a token, and passes with tokens of a ``prompt``."""

    decode: AbstractContextManager[None] = nullcontext()
    prompt: AbstractContextManager[None] = nullcontext()
