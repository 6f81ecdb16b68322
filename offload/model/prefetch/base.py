"""The contract of what a prefetch goes by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

import torch

from cache.guesses import GuessWorth
from offload.events import PrefetchTrial

Guess = tuple[int, list[int]]
"""A layer's number and its likeliest experts, best first, at least one."""


class Prefetcher(ABC):
    """Told of every event, and asked after those of passes that decode. For the engine thread.

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

        ``hidden`` [T, H] is what the experts of ``layer`` get, a row for each token that decodes. After the last layer
        comes the first one of the next token. At most ``limit`` for each layer and token, what most tokens want first.
        Each is worked out when it is asked for.
        """

    @property
    def rests(self) -> bool:
        """Whether it would foretell nothing now."""
        return False

    def end_token(self, seconds: float) -> None:  # noqa: B027 - most do not measure
        """A decoded token took so long, on the device's clock; of several in a pass each its share."""

    def setting_changed(self) -> None:  # noqa: B027 - most do not measure
        """Another setting was changed that decides how fast tokens are."""

    @property
    def trial(self) -> PrefetchTrial | None:
        """What was measured, for those that measure. Safe from any thread."""
        return None


def most_wanted(guesses: Sequence[Sequence[int]]) -> list[int]:
    """The experts of all tokens' ``guesses``, each best first: those of most tokens first, then the better ones."""
    counts = Counter(chain.from_iterable(zip(*guesses, strict=True)))
    return [expert for expert, _ in counts.most_common()]
