"""The contract of a published way of quantising a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from offload.checkpoint.formats.packed import Entries, PackedLayout, PackedTensor

Read = Callable[[str], torch.Tensor]
ANOTHER = "use another checkpoint of this model, such as an unquantised one with --format int8 or int4"
"""What helps where a kind of quantisation is not supported."""


class Method(ABC):
    """Knows which tensors of a checkpoint are parts of a quantised matrix.

    What the files hold decides, so lists of modules that are not quantised need no reading: those have no scales.
    """

    name: ClassVar[str]
    """The ``quant_method`` of ``config.json``."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """``config`` is the ``quantization_config``. Raises ModelError, saying what is not supported."""
        self.config = config

    @abstractmethod
    def find(self, entries: Entries, read: Read) -> dict[str, PackedTensor]:
        """The packed tensors of a checkpoint by the name that they would have if they were not quantised.

        ``read`` gives a (small) checkpoint tensor. Raises ModelError if parts are missing or do not fit each other.
        """

    @abstractmethod
    def predict(self, shape: tuple[int, int], dtype: torch.dtype, transposed: bool) -> PackedLayout | None:
        """How an expert's matrix will be held, for a plan from ``config.json`` alone; None: not quantised.

        ``shape`` and ``dtype`` as the model has it; ``transposed``: that is [inputs, outputs].
        """
