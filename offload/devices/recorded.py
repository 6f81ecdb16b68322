"""Graphs in plain torch: operations written down one by one, and run again.

They are what CUDA's graphs are in all that a program can notice. Python runs once, tensors keep their places, what
lives on behind a graph is found in the same place after each replay, and what does not is gone. So what goes wrong in a
graph on a card goes wrong here.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from offload.devices.graphs import Graph, GraphError, GraphRecorder, Unwrap, host_waits, tensors_of

Place = tuple[torch.Tensor, torch.Tensor]
"""A tensor that keeps memory, and all of that memory as a plain tensor."""


@dataclass(frozen=True, slots=True)
class _Made:
    """Stands for the tensor of that number, made by an earlier operation of the same graph."""

    number: int


@dataclass(frozen=True, slots=True)
class _Given:
    """A tensor that was there before. A graph keeps none of them: on a card it would read what is there instead."""

    reference: weakref.ref[torch.Tensor]

    def get(self) -> torch.Tensor:
        found = self.reference()
        if found is None:
            raise GraphError("a tensor that a graph reads is gone")
        return found


@dataclass(slots=True)
class _Operation:
    func: Any
    args: Any
    kwargs: Any
    results: Any  # nested like the results: the numbers of new tensors, None elsewhere
    last_used: Sequence[int] = ()


class _Tape(TorchDispatchMode):
    """Writes down what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self.made: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}  # id of a tensor in `made` -> its place there

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if host_waits(func, args, kwargs, result):
            raise GraphError(f"the host waits for {func}")
        given = {id(found) for found in tensors_of(args, kwargs)}

        def new(value: Any) -> int | None:
            if not isinstance(value, torch.Tensor) or id(value) in given:
                return None
            self._numbers[id(value)] = len(self.made)
            self.made.append(value)
            return len(self.made) - 1

        operation = _Operation(func, tree_map(self._named, args), tree_map(self._named, kwargs), None)
        operation.results = tree_map(new, result)
        self.operations.append(operation)
        return result

    def _named(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        number = self._numbers.get(id(value))
        return _Given(weakref.ref(value)) if number is None else _Made(number)


class RecordedGraph(Graph):
    def __init__(self, operations: list[_Operation], alive: dict[int, Place], unwrap: Unwrap) -> None:
        """``alive``: the tensors, by number, whose memory somebody still has who was there when it was recorded."""
        self._operations = operations
        self._alive = alive
        self._unwrap = unwrap
        seen = set(alive)
        for operation in reversed(operations):
            used = {leaf.number for leaf in tree_leaves((operation.args, operation.kwargs)) if isinstance(leaf, _Made)}
            used |= {number for number in tree_leaves(operation.results) if number is not None}
            operation.last_used = tuple(used - seen)
            seen |= used

    def __len__(self) -> int:
        return len(self._operations)

    @torch.inference_mode()
    def replay(self) -> None:
        values: dict[int, torch.Tensor] = {}

        def value(found: Any) -> Any:
            if isinstance(found, _Given):
                return found.get()
            return values[found.number] if isinstance(found, _Made) else found

        for operation in self._operations:
            result = operation.func(*tree_map(value, operation.args), **tree_map(value, operation.kwargs))
            for number, made in zip(_leaves(operation.results), _leaves(result), strict=True):
                if number is not None:
                    values[number] = made
            del result
            for number in operation.last_used:
                del values[number]
        for number, (_, place) in self._alive.items():
            made = self._unwrap(values[number])
            if place.data_ptr() != made.data_ptr():
                place.copy_(made)


class OperationRecorder(GraphRecorder):
    """Records :class:`RecordedGraph`; the operations run as they are recorded."""

    def __init__(self) -> None:
        self._tape: _Tape | None = None

    def begin(self) -> None:
        self._tape = _Tape()
        self._tape.__enter__()

    def end(self) -> Graph:
        tape = self._tape
        assert tape is not None
        self.abort()
        owners, forms = self._memory(tape.made)
        references = [weakref.ref(made) for made in tape.made]
        operations = tape.operations
        del tape
        alive: dict[int, Place] = {}
        for number, reference in enumerate(references):
            holder, owner = reference(), owners[number]
            if holder is not None and owner not in alive:
                alive[owner] = (holder, self.unwrap(holder).as_strided(*forms[owner]))
        return self.graph(operations, alive)

    def abort(self) -> None:
        tape, self._tape = self._tape, None
        if tape is not None:
            tape.__exit__(None, None, None)

    def graph(self, operations: list[Any], alive: dict[int, Place]) -> Graph:
        return RecordedGraph(operations, alive, self.unwrap)

    def _memory(self, tensors: list[torch.Tensor]) -> tuple[list[int], list[tuple[Any, Any, int]]]:
        """For each the number of the one that was made with its memory, which is itself if it is no view; and what
        part of that memory it is."""
        first: dict[int, int] = {}
        plain = [self.unwrap(tensor) for tensor in tensors]
        places = [one.untyped_storage().data_ptr() for one in plain]  # 0 if there is nothing in it
        owners = [first.setdefault(place, number) if place else number for number, place in enumerate(places)]
        return owners, [(one.shape, one.stride(), one.storage_offset()) for one in plain]


def _leaves(value: Any) -> list[Any]:
    """Also where a leaf is None."""
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]
