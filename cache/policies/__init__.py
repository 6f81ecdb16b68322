"""Eviction policies by name: ``make_policy("ewma:half_life=16")``."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from cache.policies.arc import ARC
from cache.policies.base import Policy, PolicyContext, PolicyError
from cache.policies.belady import Belady
from cache.policies.ewma import EWMA
from cache.policies.foresight import Foresight
from cache.policies.least_stale import LeastStale
from cache.policies.lfu import LFU
from cache.policies.lru import LRU
from cache.policies.per_layer import PerLayer
from cache.policies.random import Random
from cache.policies.s3fifo import S3FIFO
from cache.policies.sieve import Sieve
from cache.policies.slru import SLRU
from cache.policies.static import Static
from cache.shares import SCOPES

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (LRU, LFU, EWMA, SLRU, S3FIFO, Sieve, ARC, LeastStale, Static, Random, Foresight, Belady)
}

__all__ = [
    "POLICIES",
    "Policy",
    "PolicyContext",
    "PolicyError",
    "is_simulation_only",
    "make_policy",
    "runtime_policies",
]


def runtime_policies() -> list[str]:
    """The names of the policies that do not need to know the future."""
    return sorted(name for name, policy in POLICIES.items() if not policy.simulation_only)


def is_simulation_only(spec: str) -> bool:
    """Whether the policy of ``spec`` exists and needs to know the future."""
    kind = POLICIES.get(spec.strip().partition(":")[0])
    return kind is not None and kind.simulation_only


def make_policy(spec: str, context: PolicyContext | None = None) -> Policy:
    """A fresh policy from ``NAME`` or ``NAME:key=value,key=value`` for the scope in ``context`` (default: global).

    Raises PolicyError for an unknown name, scope, parameter or value; the message says what exists.
    """
    context = context or PolicyContext()
    if context.scope not in SCOPES:
        raise PolicyError(f"unknown scope '{context.scope}'; there are {', '.join(SCOPES)}")
    name, _, text = spec.strip().partition(":")
    if name not in POLICIES:
        raise PolicyError(f"unknown policy '{name}'; there are {', '.join(runtime_policies())}")
    kind = POLICIES[name]
    if kind.simulation_only and context.future is None:
        raise PolicyError(
            f"policy {name} needs to know the future: it is for replay and tune; there are "
            f"{', '.join(runtime_policies())}"
        )
    values = {kind.takes: text} if kind.takes else _parameters(kind, text)
    if context.scope == "global" or kind.all_layers:
        return kind.create(context, **values)
    kind.create(context, **values)  # bad values are said at once, not at a layer's first event
    return PerLayer(name, lambda layer: kind.create(replace(context, layer=layer), **values))


def _parameters(kind: type[Policy], text: str) -> dict[str, Any]:
    known = {
        parameter.name: parameter.default
        for parameter in inspect.signature(kind).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    values: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in known:
            have = f"; it has {', '.join(known)}" if known else "; it has none"
            raise PolicyError(f"policy {kind.name} has no parameter '{key}'{have}")
        try:
            values[key] = type(known[key])(value)
        except ValueError:
            raise PolicyError(f"policy {kind.name}: {key}='{value}' is not a number") from None
    return values
