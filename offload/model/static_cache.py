"""A KV cache whose tensors stay where they are, for decode passes that are replayed as graphs.

It works on the conversation's own cache: full attention writes into the same buffers, at a position that is read from a
tensor, and sees the first so many places of them, those that no token has yet masked. What a growing cache makes anew
for every token (sliding windows, recurrent states) has a copy here, which is brought up to date before and handed back
afterwards. The masks are the library's: a layer that says it can be compiled gets one also for a single token.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from offload.devices.graphs import GraphError
from offload.model.kv_cache import Fp8Layer, PreallocatedLayer, from_fp8, to_fp8


class Position:
    """Where the token of a pass stands: ``index`` [1] on the device, and what follows from it, computed once a pass."""

    def __init__(self, device: torch.device) -> None:
        self.index = torch.zeros(1, dtype=torch.long, device=device)
        self.length = self.index[0]
        self._rings: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin_pass(self) -> None:
        self._rings.clear()

    def ring(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """In a ring of the last ``size`` tokens: the place [1] of this one, and for each place [size] what makes its
        token's position of its number. Those that hold no token yet count as later ones, which the mask hides.
        """
        found = self._rings.get(size)
        if found is None:
            places = torch.arange(size, device=self.index.device)
            positions = self.index - torch.remainder(self.index - places, size)
            positions = torch.where(positions < 0, self.index + 1, positions)
            found = self._rings[size] = torch.remainder(self.index, size), positions - places
        return found


class _StaticLayer(CacheLayerMixin):
    is_compileable = True

    def __init__(self, position: Position) -> None:
        super().__init__()
        self._position = position
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise GraphError("a layer of the KV cache begins in the middle of an answer")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise GraphError("a layer of the KV cache begins in the middle of an answer")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return self._position.length  # type: ignore[return-value]  # as the library's static layers do

    def get_max_length(self) -> int:
        return -1

    def adopt(self, source: Any) -> bool:
        """Stand for ``source`` from now on, the same layer of a cache that began anew. False if that cannot be."""
        return not source.is_initialized

    def enter(self, tokens: int) -> None:
        """Take what the conversation's layer has, which is ``tokens`` long."""

    def leave(self, tokens: int) -> None:
        """Make the conversation's layer ``tokens`` long."""

    def unmoved(self) -> bool:
        """Whether the library has left the tensors in their places."""
        return True


class FullLayer(_StaticLayer):
    """Full attention over the first ``size`` places of the conversation's own buffers."""

    def __init__(self, source: PreallocatedLayer, size: int, position: Position) -> None:
        super().__init__(position)
        source.clear(size)
        self._source = source
        self._size = size
        self.keys, self.values = self._held = tuple(buffer[:, :, :size] for buffer in source.buffers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for held, states in zip(self._held, (key_states, value_states), strict=True):
            held.index_copy_(2, self._position.index, states)
        return self._held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._size, 0

    def adopt(self, source: Any) -> bool:
        return source is self._source

    def leave(self, tokens: int) -> None:
        self._source.show(tokens)

    def unmoved(self) -> bool:
        return self.keys is self._held[0] and self.values is self._held[1]


class Fp8FullLayer(FullLayer):
    """The same where keys and values are kept in 8 bits."""

    def __init__(self, source: Fp8Layer, size: int, position: Position) -> None:
        super().__init__(source, size, position)
        self._scales = [scales[:, :, :size] for scales in source.scales]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        index, dtype = self._position.index, key_states.dtype
        for held, scales, states in zip(self._held, self._scales, (key_states, value_states), strict=True):
            codes, scale = to_fp8(states)
            held.view(torch.uint8).index_copy_(2, index, codes.view(torch.uint8))  # no dtype of its own to copy
            scales.index_copy_(2, index, scale)
        keys, values = (from_fp8(held, scales, dtype) for held, scales in zip(self._held, self._scales, strict=True))
        return keys, values


class WindowLayer(_StaticLayer):
    """A sliding window as a ring: a token takes the place of the one that has just left the window."""

    is_sliding = True

    def __init__(self, source: DynamicSlidingWindowLayer, size: int, position: Position) -> None:
        super().__init__(position)
        self._source = source
        self._window = source.sliding_window
        self._size = min(self._window, size)
        self.keys, self.values = self._held = tuple(
            states.new_zeros((*states.shape[:2], self._size, states.shape[3])) for states in _states(source)
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        place, _ = self._position.ring(self._size)
        for held, states in zip(self._held, (key_states, value_states), strict=True):
            held.index_copy_(2, place, states)
        return self._held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._size, self._position.ring(self._size)[1]  # type: ignore[return-value]  # one for each place

    def adopt(self, source: Any) -> bool:
        self._source = source
        return bool(source.is_initialized)

    def enter(self, tokens: int) -> None:
        places = self._places(tokens)
        for held, states in zip(self._held, _states(self._source), strict=True):
            held.index_copy_(2, places, states)

    def leave(self, tokens: int) -> None:
        places = self._places(tokens)
        self._source.keys, self._source.values = (held.index_select(2, places) for held in self._held)
        self._source.cumulative_length = tokens

    def unmoved(self) -> bool:
        return self.keys is self._held[0] and self.values is self._held[1]

    def _places(self, tokens: int) -> torch.Tensor:
        """Of those that the conversation's layer keeps of so many tokens, in order."""
        kept = min(tokens, self._window - 1)
        return torch.arange(tokens - kept, tokens, device=self._position.index.device) % self._size


class RecurrentLayer(LinearAttentionLayer):
    """The library's layer writes its states in place: this one has copies of them."""

    def __init__(self, source: LinearAttentionLayer) -> None:
        super().__init__(number_of_states=source.number_of_states)
        self._source = source
        self.device, self.dtype = source.device, source.dtype
        self.conv_kernel_size = dict(source.conv_kernel_size)
        self.is_conv_states_initialized = dict(source.is_conv_states_initialized)
        self.is_recurrent_states_initialized = dict(source.is_recurrent_states_initialized)
        for mine, theirs in zip(_recurrent(self), _recurrent(source), strict=True):
            mine.update({number: state.clone() for number, state in theirs.items() if state is not None})
        self._held = [dict(states) for states in _recurrent(self)]

    def adopt(self, source: Any) -> bool:
        self._source = source
        theirs = [[number for number, state in states.items() if state is not None] for states in _recurrent(source)]
        return theirs == [[number for number, state in held.items() if state is not None] for held in self._held]

    def enter(self, tokens: int) -> None:
        self.has_previous_state = dict(self._source.has_previous_state)
        self._copy(_recurrent(self._source), self._held)

    def leave(self, tokens: int) -> None:
        self._copy(self._held, _recurrent(self._source))

    def unmoved(self) -> bool:
        now = zip(_recurrent(self), self._held, strict=True)
        return all(mine[number] is state for mine, held in now for number, state in held.items())

    @staticmethod
    def _copy(origins: list[dict[int, Any]], targets: list[dict[int, Any]]) -> None:
        for origin, target in zip(origins, targets, strict=True):
            for number, state in origin.items():
                if state is not None:
                    target[number].copy_(state)


class NoLayer(DummyLayer):
    """A layer without states of its own."""

    def adopt(self, source: Any) -> bool:
        return True

    def enter(self, tokens: int) -> None: ...

    def leave(self, tokens: int) -> None: ...

    def unmoved(self) -> bool:
        return True


class StaticCache(Cache):
    """``source``, the cache of a conversation, as decode passes see it that end within ``size`` tokens."""

    def __init__(self, source: DynamicCache, size: int, device: torch.device) -> None:
        """Raises GraphError for a kind of layer that is not known here."""
        self.position = Position(device)
        self.size = size
        super().__init__(layers=[_static(layer, size, self.position) for layer in source.layers])

    def adopt(self, source: DynamicCache) -> bool:
        """Stand for ``source`` from now on, a cache of the same model. False if its tensors are in other places."""
        pairs = zip(self.layers, source.layers, strict=False)
        return len(self.layers) == len(source.layers) and all(layer.adopt(theirs) for layer, theirs in pairs)

    def enter(self, tokens: int) -> None:
        for layer in self.layers:
            layer.enter(tokens)

    def leave(self, tokens: int) -> None:
        for layer in self.layers:
            layer.leave(tokens)

    def unmoved(self) -> bool:
        return all(layer.unmoved() for layer in self.layers)


def why_not_static(cache: DynamicCache) -> str | None:
    """The kind of layer that keeps an empty cache of a model from being a :class:`StaticCache`, if there is one."""
    known = (PreallocatedLayer, Fp8Layer, DynamicSlidingWindowLayer, LinearAttentionLayer, DummyLayer)
    return next((type(layer).__name__ for layer in cache.layers if type(layer) not in known), None)


def _static(layer: Any, size: int, position: Position) -> Any:
    kind = type(layer)
    if kind is DummyLayer:
        return NoLayer()
    if kind is LinearAttentionLayer:
        return RecurrentLayer(layer)
    if not layer.is_initialized:  # it uses the keys of another one
        return _StaticLayer(position)
    if kind is Fp8Layer:
        return Fp8FullLayer(layer, size, position)
    if kind is PreallocatedLayer:
        return FullLayer(layer, size, position)
    if kind is DynamicSlidingWindowLayer:
        return WindowLayer(layer, size, position)
    raise GraphError(f"{kind.__name__} is no kind of KV cache that has a static form here")


def _states(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.keys, layer.values


def _recurrent(layer: Any) -> list[dict[int, Any]]:
    return [layer.conv_states, layer.recurrent_states]
