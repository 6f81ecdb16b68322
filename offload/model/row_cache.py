"""KV caches of the rows of a batch: as many as a number of bytes holds."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PretrainedConfig

from offload.memory.rows import RowMemory
from offload.model.attention import KEY_BLOCK
from offload.model.kv_cache import PreallocatedLayer, new_kv_cache


class RowCaches:
    """Hands out caches, each for the tokens that its row may have at most, and counts what they take."""

    def __init__(
        self, config: PretrainedConfig, memory: RowMemory, pool_bytes: int, context: int, kind: str = "dynamic"
    ) -> None:
        """``context``: no row has more tokens. The pool must hold one such row. ``kind``: of KV cache."""
        self._config = config
        self._memory = memory
        self._pool = pool_bytes
        self._context = context
        self._kind = kind
        self._held: dict[int, int] = {}  # id of a cache -> its bytes
        self.can_copy = all(isinstance(layer, PreallocatedLayer) for layer in new_kv_cache(config, KEY_BLOCK).layers)
        """Whether the beginning of one row can be given to another: a sliding window has forgotten it."""

    def room(self, without: DynamicCache | None = None) -> int:
        """Most tokens of a row that there is room for, were the cache ``without`` released; maybe less than 1."""
        held = sum(self._held.values()) - (0 if without is None else self._held[id(without)])
        left = self._pool - held - self._memory.fixed
        tokens = left // self._memory.per_token if self._memory.per_token else self._context if left >= 0 else 0
        return tokens if tokens >= self._context else tokens // KEY_BLOCK * KEY_BLOCK

    def new(self, tokens: int) -> DynamicCache:
        """An empty cache for a row of at most ``tokens``, which there must be room for."""
        cache = new_kv_cache(self._config, self._capacity(tokens), self._kind)
        self._held[id(cache)] = self._bytes(tokens)
        return cache

    def release(self, cache: DynamicCache) -> None:
        """The row is done with ``cache``: its memory is given back."""
        del self._held[id(cache)]
        cache.layers.clear()

    def clear(self) -> None:
        self._held.clear()

    @torch.inference_mode()
    def copy(self, source: DynamicCache, target: DynamicCache, tokens: int) -> None:
        """Give the empty ``target`` the first ``tokens`` of ``source``."""
        for ours, theirs in zip(target.layers, source.layers, strict=True):
            if theirs.is_initialized:  # layers that use another one's keys have none of their own
                ours.copy_from(theirs, tokens)

    def rewind(self, cache: DynamicCache, tokens: int) -> int:
        """Forget all but the first ``tokens`` after a pass that failed; returns how many are left, maybe none."""
        try:
            for layer in cache.layers:
                if (extra := layer.get_seq_length() - tokens) > 0:
                    layer.crop(-extra)
        except RuntimeError:  # a sliding window that has moved on
            capacity = max(
                (layer.capacity for layer in cache.layers if isinstance(layer, PreallocatedLayer)), default=0
            )
            cache.layers = new_kv_cache(self._config, capacity, self._kind).layers
            return 0
        return tokens

    def _bytes(self, tokens: int) -> int:
        return self._memory.bytes(self._capacity(tokens))

    def _capacity(self, tokens: int) -> int:
        return min(whole_blocks_of(tokens), self._context)


def whole_blocks_of(tokens: int) -> int:
    """What a row of ``tokens`` gets room for: attention may look at whole blocks of keys."""
    return -(-tokens // KEY_BLOCK) * KEY_BLOCK
