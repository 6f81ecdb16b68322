"""One forward pass over many rows: their tokens stand one after the other in a single sequence, [1, sum of tokens].

All that works token by token (norms, projections, routers, experts) runs for all rows at once, so an expert is read
once for all of them. Attention alone must know where a row begins: keys and values go to a cache of each row's own, and
an attention function behind transformers' ``AttentionInterface`` attends row by row with the function that the model
uses otherwise. The layout is that of "selective batching" (Yu et al., "Orca: a distributed serving system for
Transformer-based generative models", OSDI 2022).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from offload.errors import ModelError
from offload.model.families import caches_latents, rows_may_share
from offload.model.kv_cache import PreallocatedLayer

NAME = "run_local_rows"
_HOOK = "run_local_rows"
MaskKey = tuple[int, int, int | None, bool]


@dataclass(frozen=True, slots=True)
class Segment:
    """``tokens`` of one row, which come on top of what is in its ``cache``."""

    cache: DynamicCache
    tokens: Sequence[int]

    @property
    def start(self) -> int:
        """Position of the first of them in the row."""
        return self.cache.get_seq_length()


@dataclass(slots=True)
class _LayerOfRows:
    """What attention must know of the layer whose keys were cached last."""

    handed_out: torch.Tensor
    lengths: Sequence[int]
    states: Sequence[tuple[torch.Tensor, torch.Tensor]]
    windows: Sequence[int | None]
    masks: dict[MaskKey, torch.Tensor]


class RowAttention:
    """Lets one model run packed sequences while :meth:`entered`; it can run nothing else meanwhile."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.joins = caches_latents(model.config.get_text_config())
        """The model computes on cached states before it attends: it gets those of all rows, one after the other."""
        self.stock: str = model.config.get_text_config()._attn_implementation
        self.layer: _LayerOfRows | None = None
        self._model = model

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Changes the model's config and puts it back."""
        AttentionInterface.register(NAME, _attention)  # no mask has that name, so that the model makes none
        self._model.set_attn_implementation(NAME)
        for module in self._model.modules():
            module.__dict__[_HOOK] = self
        try:
            yield
        finally:
            self.layer = None
            for module in self._model.modules():
                module.__dict__.pop(_HOOK, None)
            self._model.set_attn_implementation(self.stock)

    def run(self, segments: Sequence[Segment], device: torch.device | str = "cpu") -> torch.Tensor:
        """One forward pass on the model's ``device``. Returns the logits of the last token of each segment,
        [segments, V].

        After an error the rows' caches may hold a part of their tokens.
        """
        positions = torch.cat([torch.arange(part.start, part.start + len(part.tokens)) for part in segments])
        ends = torch.tensor([len(part.tokens) for part in segments]).cumsum(0) - 1
        output = self._model(
            input_ids=torch.tensor([[token for part in segments for token in part.tokens]], device=device),
            position_ids=positions[None].to(device),
            past_key_values=_PackedCache(self, segments),
            use_cache=True,
            logits_to_keep=ends.to(device),
        )
        logits: torch.Tensor = output.logits[0]
        return logits


class _PackedCache(Cache):
    """What a model takes for its KV cache while it runs a packed sequence. Changes the rows' caches."""

    def __init__(self, attention: RowAttention, segments: Sequence[Segment]) -> None:
        super().__init__(layers=[])
        self._attention = attention
        self._rows = [segment.cache for segment in segments]
        self._lengths = [len(segment.tokens) for segment in segments]
        self._masks: dict[MaskKey, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give each row its part, [1, heads, its tokens, width]."""
        states: list[tuple[torch.Tensor, torch.Tensor]] = []
        windows: list[int | None] = []
        parts = zip(key_states.split(self._lengths, dim=2), value_states.split(self._lengths, dim=2), strict=True)
        for row, (keys, values) in zip(self._rows, parts, strict=True):
            layer = row.layers[layer_idx]
            states.append(layer.update(keys, values))
            windows.append(layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None)
        if self._attention.joins:
            key_states, value_states = (torch.cat([pair[part] for pair in states], dim=2) for part in (0, 1))
        self._attention.layer = _LayerOfRows(key_states, self._lengths, states, windows, self._masks)
        return key_states, value_states


def can_pack(model: PreTrainedModel, cache: DynamicCache) -> bool:
    """Whether rows of this model may share a pass. ``cache`` is one of its caches.

    Every layer must keep keys and values and nothing else, leave attention to transformers' interface, and be of a
    family that was checked: indexers, compressed keys and chunked attention do not show from outside.
    """
    plain = all(
        isinstance(layer, PreallocatedLayer) or type(layer) is DynamicSlidingWindowLayer for layer in cache.layers
    )
    indexed = any(getattr(module, "indexer", None) is not None for module in model.modules())
    return plain and not indexed and rows_may_share(model.config.model_type)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """``query`` [1, heads, all tokens, width]; ``key`` and ``value`` are of all rows, if the model joins them, or else
    of the new tokens alone. Returns [1, all tokens, heads, width].
    """
    attention: RowAttention = module.__dict__[_HOOK]
    layer = attention.layer
    if layer is None or attention_mask is not None or (key is not layer.handed_out and not attention.joins):
        raise ModelError(f"{type(module).__name__} attends in a way that rows cannot share; use --batch-size 1")
    eager = attention.stock == "eager"
    function: Any = (
        sys.modules[type(module).__module__].eager_attention_forward if eager else AttentionInterface()[attention.stock]
    )
    states = layer.states
    if attention.joins:
        ends = [keys.shape[2] for keys, _ in states]
        states = list(zip(key.split(ends, dim=2), value.split(ends, dim=2), strict=True))
    outputs = []
    for own, (keys, values), window in zip(query.split(layer.lengths, dim=2), states, layer.windows, strict=True):
        mask = _mask(own, keys.shape[2], window, eager, layer.masks)
        outputs.append(function(module, own, keys, values, mask, **options)[0])
    return torch.cat(outputs, dim=1), None


def _mask(
    query: torch.Tensor, keys: int, window: int | None, additive: bool, made: dict[MaskKey, torch.Tensor]
) -> torch.Tensor | None:
    """Which of ``keys`` positions each of the last ones, those of ``query``, may see, [1, 1, tokens, keys].

    None for a single one: it sees all, since a sliding layer hands out no more than the window.
    """
    count = query.shape[2]
    if count == 1:
        return None
    key = (count, keys, window, additive)
    if key not in made:
        own = torch.arange(keys - count, keys, device=query.device)[:, None]
        others = torch.arange(keys, device=query.device)[None]
        seen = others <= own
        if window is not None:
            seen &= others > own - window
        if additive:
            seen = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(
                ~seen, torch.finfo(query.dtype).min
            )
        made[key] = seen[None, None]
    return made[key]
