"""How many threads torch uses while one token is computed."""

from __future__ import annotations

from types import TracebackType

import torch


class OneThread:
    """While entered, torch's own operations run on one thread and without oneDNN.

    For decoding with quantised weights. The kernels, which have threads of their own, do all large products there; what
    is left to torch are small tensors, for which waking a second thread takes longer than the work, the more so as the
    kernels' threads are then still looking for more. A router's product of a bf16 matrix takes 17 microseconds this
    way, 40 with oneDNN on an idle machine, and over 1000 with oneDNN beside the kernels' threads
    (docs/performance.md). Can be entered again after it was left, not twice at a time.
    """

    def __enter__(self) -> None:
        self._threads = torch.get_num_threads()
        self._library = torch.backends.mkldnn.enabled
        torch.set_num_threads(1)
        torch.backends.mkldnn.enabled = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_num_threads(self._threads)
        torch.backends.mkldnn.enabled = self._library
