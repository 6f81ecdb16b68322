"""Makes routing traces whose statistics are set beforehand: for tests, and for models that nobody has recorded yet.

Every layer draws its choices from a distribution that mixes a popularity of its own, which never changes, with a topic,
which changes from request to request and within one. On top of that the first choice, and each of the others, stays
from one token to the next with a probability that is set so that the wanted shares come out. A share of the draws
copies the layer before (by a fixed pairing of experts), so that one layer foretells the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.trace import DECODE, PREFILL, Trace

Floats = NDArray[np.float64]
ByLayer = float | Sequence[tuple[int, float]]
"""One value for all layers, or (layer, value) points with straight lines between them."""


class SyntheticError(ValueError):
    """Statistics that no trace can have; the message names the field and what is possible."""


@dataclass(frozen=True, slots=True)
class SyntheticSettings:
    """What the trace shall look like.

    ``repeat`` is how often a token has the first choice of the token before it (None: as chance has it), ``overlap``
    the share of its experts that the token before had (likewise). ``skew`` is the spread of the experts' popularity
    and ``topic`` that of the topic, both in units of the router's logits: 0 is uniform, 1 moderate, 2 strong. A topic
    lasts ``topic_tokens`` on average. ``coupling`` is the share of draws that follow the layer before. Every request
    has a prompt of ``prompt_tokens`` in one pass, and then ``tokens`` decoded ones.
    """

    layers: int = 24
    experts: int = 32
    top_k: int = 4
    tokens: int = 256
    requests: int = 4
    prompt_tokens: int = 32
    repeat: ByLayer | None = None
    overlap: ByLayer | None = None
    skew: float = 0.5
    topic: ByLayer = 1.0
    topic_tokens: float = 200.0
    coupling: float = 0.3
    seed: int = 0
    name: str = "synthetic"

    def __post_init__(self) -> None:
        for field, least, most in (
            ("layers", 1, 1000), ("experts", 1, 4096), ("top_k", 1, self.experts), ("tokens", 0, 10**6),
            ("requests", 1, 10**5), ("prompt_tokens", 0, 10**6), ("skew", 0, 20),
            ("topic_tokens", 1, 10**9), ("coupling", 0, 1), ("seed", 0, 2**63 - 1),
        ):  # fmt: skip
            if not least <= getattr(self, field) <= most:
                raise SyntheticError(f"{field} must be between {least} and {most}, not {getattr(self, field)}")
        for field, most in (("repeat", 1), ("overlap", 1), ("topic", 20)):
            value = getattr(self, field)
            for one in [value] if isinstance(value, int | float) else [one for _, one in value or ()]:
                if not 0 <= one <= most:
                    raise SyntheticError(f"{field} must be between 0 and {most}, not {one}")
        if self.tokens + self.prompt_tokens < 1:
            raise SyntheticError("tokens must be at least 1 where there is no prompt")


# What was published of real models: table 5 of arXiv 2401.04088 (means over its texts, at layers 0, 15 and 31; the
# overlaps give its "first or second choice" column), and overlaps of consecutive decoded tokens as measured on
# recorded traces (Qwen3-30B-A3B: gajsanders/moe-trace; GPT-OSS-20B: GPT-OSS-MoE-ExpertFingerprinting).
MODELS: dict[str, SyntheticSettings] = {
    "mixtral-8x7b": SyntheticSettings(
        layers=32, experts=8, top_k=2, skew=0.0, topic=0.15, name="synthetic mixtral-8x7b",
        repeat=((0, 0.14), (15, 0.26), (31, 0.23)), overlap=((0, 0.263), (15, 0.363), (31, 0.301)),
    ),
    "qwen3-30b-a3b": SyntheticSettings(
        layers=48, experts=128, top_k=8, skew=0.3, topic_tokens=2000, coupling=0.85, name="synthetic qwen3-30b-a3b",
        topic=((0, 0.3), (6, 1.9), (31, 1.9), (47, 1.0)),
        overlap=((0, 0.079), (6, 0.562), (7, 0.597), (18, 0.556), (31, 0.577), (47, 0.206)),
    ),
    "gpt-oss-20b": SyntheticSettings(
        layers=24, experts=32, top_k=4, skew=0.4, topic_tokens=2000, coupling=0.85, name="synthetic gpt-oss-20b",
        topic=((0, 0.4), (1, 0.9), (4, 1.5), (9, 1.5), (10, 2.0), (13, 2.0), (18, 1.1), (20, 1.1), (23, 1.8)),
        overlap=(
            (0, 0.19), (1, 0.28), (2, 0.37), (4, 0.49), (9, 0.49), (10, 0.59), (13, 0.61), (18, 0.34), (20, 0.33),
            (23, 0.60),
        ),
    ),
}  # fmt: skip

_BURN_IN = 400
_CHAINS = 8
_BLOCK = 64  # tokens whose noise is drawn at once


def synthetic_trace(settings: SyntheticSettings) -> Trace:
    """Make the trace; the same settings give the same one. Raises SyntheticError where no trace has such statistics."""
    random = np.random.default_rng(settings.seed)
    router = _Router(settings, random)
    router.settle(random)
    ids = router.run(settings.requests, settings.prompt_tokens + settings.tokens, random)
    return _as_trace(settings, ids, random)


class _Router:
    """Draws the experts of many independent token sequences at once. Arrays are [R, L, ...] for R sequences."""

    def __init__(self, settings: SyntheticSettings, random: np.random.Generator) -> None:
        self.settings = settings
        shape = (settings.layers, settings.experts)
        self._pairing = np.stack([random.permutation(settings.experts) for _ in range(settings.layers)])
        self._popularity = settings.skew * self._linked(random.standard_normal(shape), random.random(settings.layers))
        self._topic = _by_layer(settings.topic, settings.layers)[:, None]
        self._keep = np.zeros(settings.layers)
        self._repeat = None if settings.repeat is None else _by_layer(settings.repeat, settings.layers)
        self._overlap = None if settings.overlap is None else _by_layer(settings.overlap, settings.layers)

    def _linked(self, values: Floats, coin: Floats) -> Floats:
        """Layers whose ``coin`` [..., L] falls below ``coupling`` take the values [..., L, E] of the layer before."""
        linked = coin < self.settings.coupling
        for layer in range(1, self.settings.layers):
            before = values[..., layer - 1, :][..., self._pairing[layer]]
            values[..., layer, :] = np.where(linked[..., layer, None], before, values[..., layer, :])
        return values

    def settle(self, random: np.random.Generator) -> None:
        """Find by trial how likely the other choices must be to stay for the wanted overlap."""
        if self._overlap is None or self.settings.top_k == 1:
            return
        logits = self._new_topics(_CHAINS, random)
        before = None
        kept: list[Floats] = []
        for step in range(_BURN_IN):
            noise = self._noise(_CHAINS, 1, random)[:, 0]
            now = self._next(logits, before, noise, random.random((_CHAINS, self.settings.layers, 2)))
            if step % 32 >= 4:  # by then what stayed from before the topic is forgotten
                assert before is not None
                measured = (now[..., :, None] == before[..., None, :]).any(axis=-1).mean(axis=(0, 2))
                self._keep = np.clip(self._keep + (self._overlap - measured) / (1 + step / 16), 0, 1)
                kept.append(self._keep)
            before = now
            if step % 32 == 31:  # the mean over topics is wanted, not the overlap within one
                logits, before = self._new_topics(_CHAINS, random), None
        self._keep = np.mean(kept[len(kept) // 2 :], axis=0)

    def run(self, requests: int, tokens: int, random: np.random.Generator) -> NDArray[np.int16]:
        """The experts of ``requests`` sequences, [R, T, L, k], the first choice first."""
        settings = self.settings
        ids = np.empty((requests, tokens, settings.layers, settings.top_k), np.int16)
        logits = self._new_topics(requests, random)
        before = None
        for start in range(0, tokens, _BLOCK):
            noise = self._noise(requests, min(_BLOCK, tokens - start), random)
            for step in range(noise.shape[1]):
                changed = random.random(requests) < 1 / settings.topic_tokens
                if changed.any():
                    logits[changed] = self._new_topics(int(changed.sum()), random)
                coins = random.random((requests, settings.layers, 2))
                before = self._next(logits, before, noise[:, step], coins)
                ids[:, start + step] = before
        return ids

    def _new_topics(self, sequences: int, random: np.random.Generator) -> Floats:
        """The logits of new topics, [R, L, E]."""
        shape = (sequences, self.settings.layers, self.settings.experts)
        topic = self._linked(random.standard_normal(shape), random.random(shape[:2]))
        return self._popularity + self._topic * topic

    def _noise(self, sequences: int, tokens: int, random: np.random.Generator) -> Floats:
        """Gumbel's noise [R, T, L, E]: the largest sums of it and the logits are draws without replacement."""
        shape = (sequences, tokens, self.settings.layers, self.settings.experts)
        return self._linked(random.gumbel(size=shape), random.random(shape[:3]))

    def _next(
        self, logits: Floats, before: NDArray[np.int64] | None, noise: Floats, coins: Floats
    ) -> NDArray[np.int64]:
        """The experts of the next token, [R, L, k]. ``coins`` [R, L, 2] say what stays."""
        scores = logits + noise
        if before is not None:
            bonus = np.zeros_like(scores)
            others = before[..., 1:]
            # each of the others stays by itself; one coin of the layer is stretched to as many as are needed
            stays = (coins[..., 1, None] * 7919 * (1 + np.arange(others.shape[-1]))) % 1 < self._keep[:, None]
            np.put_along_axis(bonus, others, np.where(stays, 1e3, 0.0), axis=-1)
            same = coins[..., 0] < self._stay_first(logits)
            first = np.where(same, before[..., 0], scores.argmax(axis=-1))
            scores += bonus
            np.put_along_axis(scores, first[..., None], 1e6, axis=-1)
        k = self.settings.top_k
        if k == self.settings.experts:
            chosen = np.broadcast_to(np.arange(k), (*scores.shape[:-1], k))
        else:
            chosen = np.argpartition(-scores, k - 1, axis=-1)[..., :k]
        order = np.argsort(-np.take_along_axis(scores, chosen, axis=-1), axis=-1)
        return np.take_along_axis(chosen, order, axis=-1)

    def _stay_first(self, logits: Floats) -> Floats:
        """How likely the first choice must stay, [R, L], so that it is repeated as often as wanted.

        A new draw is the old choice with the chance s, the sum of squared probabilities: stay + (1 - stay) s = repeat.
        """
        if self._repeat is None:
            return np.zeros(logits.shape[:2])
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        chances = weights / weights.sum(axis=-1, keepdims=True)
        by_chance = (chances**2).sum(axis=-1)
        if (by_chance.mean(axis=0) > self._repeat + 0.02).any():
            layer = int((by_chance.mean(axis=0) - self._repeat).argmax())
            raise SyntheticError(
                f"repeat: {self._repeat[layer]:.3f} in layer {layer} is less than chance gives with this skew and "
                f"topic ({by_chance.mean(axis=0)[layer]:.3f}); ask for more, or for less skew and topic"
            )
        stay = (self._repeat - by_chance) / np.maximum(1 - by_chance, 1e-9)
        return np.asarray(np.clip(stay, 0, 1))


def _by_layer(value: ByLayer, layers: int) -> Floats:
    if isinstance(value, int | float):
        return np.full(layers, float(value))
    points = sorted(value)
    return np.interp(np.arange(layers), [layer for layer, _ in points], [share for _, share in points])


def _as_trace(settings: SyntheticSettings, ids: NDArray[np.int16], random: np.random.Generator) -> Trace:
    """Rows in execution order: a request's prompt layer by layer, then its tokens one by one."""
    prompt, layers, k = settings.prompt_tokens, settings.layers, settings.top_k
    steps, numbers = np.meshgrid(np.arange(ids.shape[1]), np.arange(layers), indexing="ij")
    passes = np.maximum(steps - prompt + (prompt > 0), 0)
    order = np.lexsort((steps.ravel(), numbers.ravel(), passes.ravel()))
    each, rows = len(order), len(order) * settings.requests

    def repeated(values: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.tile(values.ravel()[order], settings.requests)

    request = np.repeat(np.arange(settings.requests), each)
    shares = -np.sort(-random.exponential(size=(rows, k)), axis=1)
    return Trace(
        request=request.astype(np.int32),
        phase=np.where(repeated(steps) < prompt, PREFILL, DECODE).astype(np.uint8),
        step=repeated(steps).astype(np.int32),
        forward=(repeated(passes) + request * (int(passes.max()) + 1)).astype(np.int32),
        layer=repeated(numbers).astype(np.int16),
        ids=ids.reshape(settings.requests, each, k)[:, order].reshape(rows, k),
        weights=(shares / shares.sum(axis=1, keepdims=True)).astype(np.float16),
        meta={"model": settings.name, "layers": layers, "experts": settings.experts, "top_k": k},
    )
