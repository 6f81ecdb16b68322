"""What a forward pass tells the experts, and what they count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cache.trace import DECODE, PREFILL, TraceRecorder


@dataclass(slots=True)
class ForwardPass:
    """What the engine is doing while the experts run: for the trace and for counting prefill and decode apart.

    ``step`` is the position in the request of the pass's first token. A pass over several rows has ``parts``, in the
    order of their tokens: request, step, number of tokens and whether they decode; ``decode`` then means that all do.
    ``recent`` are groups of the pass's tokens, by their place in it: what they use tells the expert cache what will be
    used next. It matters where a pass has several tokens.
    """

    request: int = 0
    step: int = 0
    forward: int = 0
    decode: bool = False
    parts: Sequence[tuple[int, int, int, bool]] = ()
    recent: Sequence[Sequence[int]] = ()

    @property
    def one_token(self) -> bool:
        """Whether it decodes for one row alone."""
        return self.decode and len(self.parts) < 2

    def record(self, recorder: TraceRecorder, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Tell a trace what ``layer`` chose: ``ids`` and ``weights`` are [T, k]."""
        chosen = ids.to("cpu", torch.int16, copy=True).numpy()
        shares = weights.to("cpu", torch.float16, copy=True).numpy()
        first = 0
        for request, step, count, decode in self.parts or ((self.request, self.step, len(chosen), self.decode),):
            recorder.record(
                request=request,
                phase=DECODE if decode else PREFILL,
                step=step,
                forward=self.forward,
                layer=layer,
                ids=chosen[first : first + count],
                weights=shares[first : first + count],
            )
            first += count


@dataclass(slots=True)
class TransferCounters:
    """Sums since the start: bytes read from disk, those of records that passes took and that were not held when the
    pass began, the seconds that compute waited for them, loads on a prediction and those of them that an event used,
    the bytes of those loads, records that passes of several tokens read before their event, and those of them that it
    took, events, the calls that computed their experts, misses that the CPU computed beside the device, and the bytes
    of their records, which the link did not have to carry for that."""

    prefill_bytes: int = 0
    decode_bytes: int = 0
    needed_bytes: int = 0
    stall_seconds: float = 0.0
    prefetched: int = 0
    prefetch_used: int = 0
    prefetch_bytes: int = 0
    read_ahead: int = 0
    read_ahead_used: int = 0
    events: int = 0
    compute_calls: int = 0
    computed_on_cpu: int = 0
    not_moved_bytes: int = 0

    def count_bytes(self, size: int, decode: bool) -> None:
        """``size`` bytes came from disk during a pass that decodes, or not."""
        if decode:
            self.decode_bytes += size
        else:
            self.prefill_bytes += size
