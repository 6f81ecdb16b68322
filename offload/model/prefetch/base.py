"""The contract of what a prefetch goes by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch

from cache.guesses import GuessWorth
from offload.events import PrefetchTrial

Guess = tuple[int, list[int]]
"""A layer's number and its likeliest experts, best first, at least one."""


class Prefetcher(ABC):
    """Told of every event, and asked after those of decoded tokens. For the engine thread.

    ``worth`` judges the guesses; :meth:`record_event` must tell it of every event.
    """

    def __init__(self) -> None:
        self.worth = GuessWorth()

    @abstractmethod
    def record_event(self, layer: int, experts: Sequence[int], *, decode: bool) -> None:
        """See :meth:`cache.predictors.Predictor.record_event`."""

    @abstractmethod
    def guesses(self, layer: int, hidden: torch.Tensor, limit: int) -> Iterator[Guess]:
        """What the layers after ``layer`` will need, the next one first, as far as there is anything to go by.

        ``hidden`` [1, H] is what the experts of ``layer`` get. After the last layer comes the first one of the next
        token. At most ``limit`` for each layer. Each is worked out when it is asked for.
        """

    def end_token(self, seconds: float) -> None:  # noqa: B027 - most do not measure
        """A decoded token took so long, on the device's clock."""

    def setting_changed(self) -> None:  # noqa: B027 - most do not measure
        """Another setting was changed that decides how fast tokens are."""

    @property
    def trial(self) -> PrefetchTrial | None:
        """What was measured, for those that measure. Safe from any thread."""
        return None
