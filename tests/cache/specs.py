"""Every policy that a runtime can have, made for tests."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from cache.events import Events
from cache.keys import ExpertKey
from cache.policies import Policy, PolicyContext, make_policy, runtime_policies

SPECS = runtime_policies()


def make(spec: str, scope: str = "global", seed: int = 0) -> Policy:
    """A fresh policy; ``static`` goes by 60 events of its own."""
    training = random_events(60, seed=99) if spec == "static" else None
    if spec == "foresight":
        training = None
    return make_policy(spec, PolicyContext(scope, seed, training=training))


def events_of(sets: Sequence[tuple[int, Sequence[int]]], request: Sequence[int] | None = None) -> Events:
    """Events of one decoded token each from (layer, experts)."""
    count = len(sets)
    return Events(
        np.array(request if request is not None else [0] * count, np.int32),
        np.ones(count, bool),
        np.array([layer for layer, _ in sets], np.int16),
        np.ones(count, np.int32),
        np.concatenate([[0], np.cumsum([len(experts) for _, experts in sets])]).astype(np.int64),
        np.array([expert for _, experts in sets for expert in experts], np.int16),
        np.ones(sum(len(experts) for _, experts in sets), np.float32),
    )


def random_events(count: int, *, layers: int = 3, experts: int = 8, k: int = 2, seed: int = 0) -> Events:
    """Tokens that pass the layers in order and like some experts better than others."""
    draw = random.Random(seed)
    favourites = {layer: draw.sample(range(experts), k + 1) for layer in range(layers)}
    sets = []
    for number in range(count):
        layer = number % layers
        pool = favourites[layer] if draw.random() < 0.6 else range(experts)
        sets.append((layer, draw.sample(list(pool), k)))
    return events_of(sets)


def keys(*experts: int, layer: int = 0) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in experts]
