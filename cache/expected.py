"""What hit rate to expect of a model that nobody has recorded yet: a replay of a made trace of its shape."""

from __future__ import annotations

from dataclasses import replace

from cache.simulate import ReplaySettings, replay
from cache.synthetic import MODELS, SyntheticSettings, synthetic_trace

_TOKENS = 160
_MANY_EXPERTS = 64


def made_settings(layers: int, experts: int, top_k: int, tokens: int = _TOKENS) -> SyntheticSettings:
    """A trace of this shape with the statistics of the recorded model that has most like as many experts.

    What was measured layer by layer is stretched over the layers.
    """
    like = MODELS["qwen3-30b-a3b" if experts >= _MANY_EXPERTS else "gpt-oss-20b"]
    scale = max(1, layers - 1) / (like.layers - 1)

    def stretched(points: object) -> tuple[tuple[int, float], ...]:
        assert isinstance(points, tuple)
        found = {round(layer * scale): value for layer, value in points}
        return tuple(found.items())

    chance = top_k / experts
    overlap = tuple((layer, max(share, chance)) for layer, share in stretched(like.overlap))
    return replace(
        like,
        layers=layers,
        experts=experts,
        top_k=top_k,
        tokens=tokens,
        requests=1,
        overlap=overlap,
        topic=stretched(like.topic),
        name="synthetic",
    )


def made_hit_rate(layers: int, experts: int, top_k: int, slots: int, policy: str, scope: str) -> float:
    """Of decoding behind a short prompt, from an empty cache, the events counted that met no free slot."""
    if slots >= layers * experts:
        return 1.0
    result = replay(synthetic_trace(made_settings(layers, experts, top_k)), ReplaySettings(policy, slots, scope))
    return result.steady.hit_rate or result.total.hit_rate or 0.0
