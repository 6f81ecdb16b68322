"""Graphs: operations that are launched together, once they were recorded. What a device offers for them, and what no
graph can hold.

A graph has no Python in it. Its tensors stay where they were when it was recorded, and whatever Python computed by then
is a constant: what changes from one replay to the next must be in tensors that are written before. An operation for
which the host waits for a value cannot be recorded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Unwrap = Callable[[torch.Tensor], torch.Tensor]
"""From a device's tensor to one whose address tells where its memory is."""

_aten = torch.ops.aten
_TRANSFERS = {
    _aten.copy_.default, _aten._to_copy.default, _aten.to.device, _aten.to.dtype, _aten.to.dtype_layout, _aten.to.other,
}  # fmt: skip
_VALUES = {_aten.item.default, _aten.is_nonzero.default, _aten._local_scalar_dense.default}
_INDEXING = {_aten.index.Tensor, _aten._unsafe_index.Tensor, _aten.index_put.default, _aten.index_put_.default}


class GraphError(Exception):
    """These operations cannot be a graph; the text says why."""


class Graph(ABC):
    @abstractmethod
    def replay(self) -> None:
        """Launch its operations again, behind what was launched before."""


class GraphRecorder(ABC):
    """Records one graph after the other. They are replayed in the order in which they were recorded, or not at all:
    what one leaves in a tensor that is still in use is what those behind it find there.
    """

    def prepare(self) -> None:  # noqa: B027 - most need nothing
        """Before the first graph of several."""

    @abstractmethod
    def begin(self) -> None:
        """Record the operations of this thread from now on."""

    @abstractmethod
    def end(self) -> Graph:
        """What was recorded since :meth:`begin`; it has run once when this returns. Raises what kept it from being."""

    @abstractmethod
    def abort(self) -> None:
        """Stop recording, if it does, and forget what was recorded since :meth:`begin`. Raises nothing."""

    def released(self) -> None:  # noqa: B027 - most hold nothing
        """All graphs that were recorded are gone."""

    def unwrap(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def watch(self) -> OperationWatch:
        return OperationWatch(self.unwrap)


def tensors_of(*values: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


def host_waits(func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Whether the host waits in this operation: for a value, for a size that follows from values, or for a copy."""
    if func in _VALUES or torch.Tag.data_dependent_output in func.tags:
        return True
    if func in _INDEXING:  # by what is true, which must be counted; a single value is filled in without
        by_truth = any(found.dtype in (torch.bool, torch.uint8) for found in tensors_of(args[1]))
        return by_truth and not (len(args) > 2 and args[2].numel() == 1)
    if torch.Tag.dynamic_output_shape in func.tags:
        return True
    involved = list(tensors_of(args, kwargs, result))
    if func not in _TRANSFERS:  # a number from the host is handed to a kernel with its arguments
        involved = [found for found in involved if found.dim() or found.device.type != "cpu"]
    return len({found.device for found in involved}) > 1


class OperationWatch(TorchDispatchMode):
    """Counts what the operations inside launch, and notes the first for which the host waits. Changes nothing.

    ``launches`` counts operations that write memory: views are none. One of torch's own operations counts once, however
    many kernels it is made of.
    """

    def __init__(self, unwrap: Unwrap) -> None:
        super().__init__()
        self.launches = 0
        self.waits: str | None = None
        self.paused = False
        self._unwrap = unwrap

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.paused:
            if self.waits is None and host_waits(func, args, kwargs, result):
                self.waits = str(func)
            self.launches += writes_memory(func, args, kwargs, result, self._unwrap)
        return result


def writes_memory(func: Any, args: Any, kwargs: Any, result: Any, unwrap: Unwrap) -> bool:
    """Whether an operation that gave ``result`` made or changed values; else it is a view."""
    if func._schema.is_mutable:
        return True
    before = {_address(found, unwrap) for found in tensors_of(args, kwargs)}
    return any(_address(found, unwrap) not in before for found in tensors_of(result))


def _address(tensor: torch.Tensor, unwrap: Unwrap) -> int:
    return unwrap(tensor).untyped_storage().data_ptr()
