"""How local the routing is: overlap of neighbouring tokens, popularity of the experts, hit rate of an LRU cache."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor


def one_hot(ids: Tensor, experts: int) -> Tensor:
    """Turn selected ids, int64 `[.., top_k]`, into float32 `[.., experts]` of 0 and 1."""
    return ids.new_zeros(*ids.shape[:-1], experts).scatter_(-1, ids, 1).float()


def overlap(ids: Tensor, experts: int) -> Tensor:
    """Return for each layer the mean share of a token's experts that the token before used too, float32 `[layers]`.

    `ids` is int64 `[layers, sequences, tokens, top_k]`. Uniform random routing would give top_k / experts.
    """
    used = one_hot(ids, experts)
    return (used[:, :, 1:] * used[:, :, :-1]).sum(-1).mean((1, 2)) / ids.shape[-1]


def popularity(ids: Tensor, experts: int) -> Tensor:
    """Return each expert's share of its layer's selections, times `experts` (1 = uniform), `[layers, experts]`."""
    return one_hot(ids, experts).mean((1, 2)) / ids.shape[-1] * experts


def lru_hit_rate(ids: Tensor, slots: int) -> float:
    """Return the share of accesses that an LRU cache of `slots` experts in each layer answers, from a cold start.

    `ids` int64 `[layers, tokens, top_k]` is one sequence. Event-atomic: the set of a token is looked up first, then
    what missed is loaded and the least recently used experts outside the set go. With fewer slots than top_k the rest
    of the set is streamed through.
    """
    hits = accesses = 0
    for layer in ids.tolist():
        cache: OrderedDict[int, None] = OrderedDict()
        for event in layer:
            accesses += len(event)
            hits += sum(expert in cache for expert in event)
            for expert in event[-slots:]:
                cache[expert] = None
                cache.move_to_end(expert)
            while len(cache) > slots:
                cache.popitem(last=False)
    return hits / accesses
