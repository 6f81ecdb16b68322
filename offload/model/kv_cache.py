"""The KV cache: transformers' own, with preallocated full-attention layers.

Stock ``DynamicLayer`` grows by ``torch.cat``: each step copies the whole layer and holds it twice for a moment. Here a
full-attention layer is allocated once for the context and handed out as a view. Its pages are backed as they are
written. Sliding-window and recurrent layers are bounded and stay as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, LinearAttentionLayer

from offload.memory.rows import RowMemory
from offload.model.attention import KEY_BLOCK

FP8 = torch.float8_e4m3fn
_FP8_MOST = torch.finfo(FP8).max


class PreallocatedLayer(DynamicLayer):
    """Keys and values [1, heads, tokens, head_dim], views into buffers of ``capacity`` tokens."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        buffers = tuple(  # first of all: where there is no memory for them, the layer stays as it was
            states.new_empty((*states.shape[:2], self.capacity, states.shape[3]))
            for states in (key_states, value_states)
        )
        super().lazy_initialization(key_states, value_states)
        self._buffers = buffers
        self._cleared = 0
        self.show(0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self._grown(key_states.shape[-2])
        keys, values = self._buffers
        if end > self._cleared:  # attention may look at whole blocks, and what is not a number stays none times zero
            cleared = min(-(-end // KEY_BLOCK) * KEY_BLOCK, self.capacity)
            for buffer in self._buffers:
                buffer[:, :, end:cleared].zero_()
            self._cleared = cleared
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.show(end)
        return self.keys, self.values

    def copy_from(self, other: PreallocatedLayer, tokens: int) -> None:
        """Take the first ``tokens`` of ``other``, a layer of the same kind that has begun. This one must be empty."""
        self.update(other.keys[:, :, :tokens], other.values[:, :, :tokens])

    def _grown(self, tokens: int) -> tuple[int, int]:
        """Where so many more tokens go."""
        start = self.keys.shape[-2]  # :meth:`crop` of the base class shortens the views
        if start + tokens > self.capacity:
            raise ValueError(f"{start + tokens} tokens do not fit a KV cache of {self.capacity}")
        return start, start + tokens

    @property
    def buffers(self) -> tuple[torch.Tensor, ...]:
        """Keys and values as they are kept [1, heads, capacity, width]. They stay the same once the layer has begun."""
        return self._buffers

    def show(self, tokens: int) -> None:
        """Make the layer ``tokens`` long: what was written to the buffers beyond its end becomes part of it."""
        self.keys, self.values = (buffer[:, :, :tokens] for buffer in self._buffers)

    def clear(self, tokens: int) -> None:
        """Make what lies behind the end a number, up to so many tokens: attention may look at it and weigh it zero."""
        for buffer in self._buffers:
            buffer[:, :, self.get_seq_length() : tokens].zero_()


class Fp8Layer(PreallocatedLayer):
    """As its base class, but what is kept has 8 bits: float8_e4m3fn, and a float32 scale for each head and token.

    transformers' ``Fp8QuantizedLayer`` has one scale for all, that of the first chunk, beyond which later states are
    not numbers any more, and grows by ``cat``. Attention gets states in the model's dtype, made anew for each pass.
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        both = (key_states, value_states)
        buffers = tuple(self._room(states, states.shape[3], FP8) for states in both)
        scales = tuple(self._room(states, 1, torch.float32) for states in both)
        DynamicLayer.lazy_initialization(self, key_states, value_states)
        self._buffers, self._scales = buffers, scales
        self.show(0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self._grown(key_states.shape[-2])
        for states, codes, scales in zip((key_states, value_states), self._buffers, self._scales, strict=True):
            codes[:, :, start:end], scales[:, :, start:end] = to_fp8(states)
        self.show(end)
        keys, values = (
            from_fp8(codes[:, :, :end], scales[:, :, :end], key_states.dtype)
            for codes, scales in zip(self._buffers, self._scales, strict=True)
        )
        return keys, values

    @property
    def scales(self) -> tuple[torch.Tensor, ...]:
        """Of keys and of values [1, heads, capacity, 1], as :attr:`buffers`."""
        return self._scales

    def clear(self, tokens: int) -> None:
        for buffer in (*self._buffers, *self._scales):
            buffer.view(torch.uint8)[:, :, self.get_seq_length() : tokens].zero_()

    def copy_from(self, other: PreallocatedLayer, tokens: int) -> None:
        assert isinstance(other, Fp8Layer)
        if not self.is_initialized:
            self.lazy_initialization(*(buffer[:, :, :0].to(other.dtype) for buffer in other._buffers))
        for ours, theirs in ((self._buffers, other._buffers), (self._scales, other._scales)):
            for mine, their in zip(ours, theirs, strict=True):
                mine[:, :, :tokens] = their[:, :, :tokens]
        self.show(tokens)

    def _room(self, states: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        return states.new_empty((*states.shape[:2], self.capacity, width), dtype=dtype)


def to_fp8(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``states`` [..., width] in 8 bits, and their scales [..., 1], float32 of values that the states' dtype has.

    So they can multiply codes of that dtype: a product of two dtypes takes torch ten times as long.
    """
    scale = states.abs().amax(-1, keepdim=True).float() / _FP8_MOST
    scale = scale.clamp(min=torch.finfo(states.dtype).tiny).to(states.dtype).float()
    return (states.float() / scale).to(FP8), scale


def from_fp8(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What :func:`to_fp8` made of states of ``dtype``, as states again; new memory."""
    return decoded(codes, dtype).mul_(scales.to(dtype))


_SHIFTS = {
    torch.bfloat16: (torch.int16, 4, -0x7810, 2.0**120),
    torch.float16: (torch.int16, 7, -0x4080, 2.0**8),
    torch.float32: (torch.int32, 20, -0x78100000, 2.0**120),
}
"""Of each dtype: integers of its size, how far the 7 low bits of a code are shifted, the bits that are kept (these and
the sign), and the power of two between the exponents' biases."""


def decoded(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``codes`` (float8_e4m3fn, finite) in another dtype, the same numbers; new memory of that dtype's size.

    By shifts, since torch converts one number after the other on the CPU: five times as fast.
    """
    integers, shift, mask, power = _SHIFTS[dtype]
    bits = codes.view(torch.int8).to(integers)  # the sign is spread over all upper bits
    return bits.bitwise_left_shift_(shift).bitwise_and_(mask).view(dtype).mul_(power)


LAYERS: dict[str, type[PreallocatedLayer]] = {"dynamic": PreallocatedLayer, "fp8": Fp8Layer}
"""What full-attention layers are under each ``--kv-cache``."""


def new_kv_cache(config: PretrainedConfig, capacity: int, kind: str = "dynamic") -> DynamicCache:
    """An empty cache for ``capacity`` tokens of one sequence, of a ``kind`` of :data:`LAYERS`."""
    cache = DynamicCache(config=config)
    cache.layers = [LAYERS[kind](capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class Borrower(ABC):
    """What may run ahead of a conversation's cache, with tensors of its own."""

    @abstractmethod
    def give_back(self) -> None:
        """Bring the cache up to what was run."""

    @abstractmethod
    def forget(self, release: bool) -> None:
        """The cache begins anew; with ``release`` in another place."""


class KVState:
    """The KV cache of one conversation, and the tokens that are in it.

    ``borrower`` may hold parts of the cache: it is asked for them before anybody else gets it, and what it works on
    stays where it is when the conversation begins anew.
    """

    def __init__(
        self, config: PretrainedConfig, capacity: int, *, kind: str = "dynamic", whole_prompts: bool = False
    ) -> None:
        """``whole_prompts``: the family cannot go on from a filled cache with several tokens at once."""
        self._config = config
        self._capacity = capacity
        self._kind = kind
        self._whole_prompts = whole_prompts
        self.borrower: Borrower | None = None
        self._cache: DynamicCache
        self.reset(release=True)

    @property
    def cache(self) -> DynamicCache:
        if self.borrower is not None:
            self.borrower.give_back()
        return self._cache

    def reset(self, release: bool = False) -> None:
        """Begin anew. ``release``: give the memory of the buffers back in any case."""
        self.tokens: list[int] = []
        new = new_kv_cache(self._config, self._capacity, self._kind)
        if self.borrower is not None:
            self.borrower.forget(release)
            if not release:
                pairs = zip(new.layers, self._cache.layers, strict=True)
                new.layers = [old if isinstance(old, PreallocatedLayer) else layer for layer, old in pairs]
                for layer in new.layers:
                    if isinstance(layer, PreallocatedLayer) and layer.is_initialized:
                        layer.show(0)
        self._cache = new

    def keep_prefix(self, prompt: list[int]) -> int:
        """Keep what the cache has in common with ``prompt``, drop the rest; returns the number of tokens kept.

        At least the last prompt token is left to compute, since its logits are wanted. Caches that cannot forget
        their last tokens (recurrent layers, a sliding window that has moved on) start anew unless all of it is kept.
        """
        if self._whole_prompts:
            self.reset()
        common = 0
        for ours, theirs in zip(self.tokens, prompt[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        self.truncate(common)
        return len(self.tokens)

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on, also after a forward pass that stopped half-way through the layers."""
        try:
            for layer in self.cache.layers:
                extra = layer.get_seq_length() - length if hasattr(layer, "get_seq_length") else 0
                if extra > 0:
                    if not (layer.is_croppable and _is_plain(layer)):
                        raise RuntimeError("this layer cannot forget")
                    layer.crop(-extra)
                elif not _is_attention(layer) and length != len(self.tokens):
                    raise RuntimeError("a recurrent state cannot forget")
        except RuntimeError:
            self.reset()
        else:
            del self.tokens[length:]

    def after_failure(self) -> None:
        """Make the cache match :attr:`tokens` again after a forward pass that did not finish."""
        if all(_is_attention(layer) for layer in self.cache.layers):
            self.truncate(len(self.tokens))
        else:
            self.reset()  # some recurrent states may have moved on, and they do not tell


def _is_plain(layer: Any) -> bool:
    """Whether what ``crop`` shortens is all that it keeps: a model's own kind of layer inherits that and has more."""
    return isinstance(layer, PreallocatedLayer) or type(layer).__module__ == DynamicLayer.__module__


def _is_attention(layer: Any) -> bool:
    return isinstance(layer, DynamicLayer) and not hasattr(layer, "conv_states")


_EVEN_LAYERS = (DynamicLayer, LinearAttentionLayer, DummyLayer)
_FEW_TOKENS = 64


@torch.inference_mode()
def kv_row_memory(model: PreTrainedModel, tokens: int, kind: str = "dynamic") -> RowMemory:
    """What the KV cache of one sequence of up to ``tokens`` tokens takes, by running ``model``, which is on the meta
    device, for its shapes. Layers that do not grow with every token count as they are at ``tokens``.

    Where all layers grow evenly or not at all, a few tokens tell: recurrent layers take a second for a hundred.
    Falls back to keys and values of every layer at full width where a model cannot run on the meta device.
    """
    config = model.config.get_text_config()
    cache = DynamicCache(config=model.config)
    if all(type(layer) in _EVEN_LAYERS for layer in cache.layers):
        tokens = min(tokens, _FEW_TOKENS)
    try:
        model(
            input_ids=torch.zeros((1, tokens), dtype=torch.long, device="meta"), past_key_values=cache, use_cache=True
        )
        grown = [layer for layer in cache.layers if type(layer) is DynamicLayer and layer.is_initialized]
        growing = sum(_tensor_bytes(layer.__dict__.values()) for layer in grown)
        fixed = sum(_tensor_bytes(layer.__dict__.values()) for layer in cache.layers if type(layer) is not DynamicLayer)
    except Exception:  # data-dependent code has many ways to fail on the meta device
        growing = fixed = 0
    if (growing or fixed) and kind == "fp8":
        unpacked = max((_tensor_bytes(layer.__dict__.values()) for layer in grown), default=0)
        packed = sum(_packed_bytes(states) for layer in grown for states in (layer.keys, layer.values))
        return RowMemory(fixed, -(-packed // tokens), -(-unpacked // tokens))
    if growing or fixed:
        return RowMemory(fixed, -(-growing // tokens))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    one = 2 * heads * width * model.dtype.itemsize
    if kind == "fp8":
        return RowMemory(0, config.num_hidden_layers * 2 * heads * (width + 4), one)
    return RowMemory(0, config.num_hidden_layers * one)


def kv_cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of the KV cache at ``tokens`` tokens; see :func:`kv_row_memory`."""
    return kv_row_memory(model, tokens).bytes(tokens)


def _packed_bytes(states: torch.Tensor) -> int:
    """As :class:`Fp8Layer` keeps them."""
    return states.numel() + 4 * states.shape[:3].numel()


def _tensor_bytes(values: Any) -> int:
    size = 0
    for value in values:
        if isinstance(value, torch.Tensor):
            size += value.numel() * value.element_size()
        elif isinstance(value, dict | list | tuple):
            size += _tensor_bytes(value.values() if isinstance(value, dict) else value)
    return size
