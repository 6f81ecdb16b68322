"""Eviction policies by name: ``make_policy("ewma:half_life=16")``."""

from __future__ import annotations

import inspect

from cache.policies.base import Policy, PolicyError
from cache.policies.ewma import EWMA
from cache.policies.lfu import LFU
from cache.policies.lru import LRU

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (LRU, LFU, EWMA)}

__all__ = ["POLICIES", "Policy", "PolicyError", "make_policy"]


def make_policy(spec: str) -> Policy:
    """A fresh policy from ``NAME`` or ``NAME:key=value,key=value``.

    Raises PolicyError for an unknown name, parameter or value; the message says what exists.
    """
    name, _, text = spec.strip().partition(":")
    if name not in POLICIES:
        raise PolicyError(f"unknown policy '{name}'; there are {', '.join(sorted(POLICIES))}")
    known = {
        parameter.name: parameter.default
        for parameter in inspect.signature(POLICIES[name]).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    values: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in known:
            have = f"; it has {', '.join(known)}" if known else "; it has none"
            raise PolicyError(f"policy {name} has no parameter '{key}'{have}")
        try:
            values[key] = type(known[key])(value)
        except ValueError:
            raise PolicyError(f"policy {name}: {key}='{value}' is not a number") from None
    return POLICIES[name](**values)
