"""What an event costs: ``python -m cache.benchmark``.

Counts processor time, so that other programs disturb little: of the policy alone (what it is told and asked for an
event, on the keys that a real cache would ask it about) and of the whole cache with it, for a model with 48 layers of
128 experts, 8 of them for each token, of which three in four are hits.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Collection, Sequence

from cache.expert_cache import ExpertCache
from cache.keys import ExpertKey
from cache.policies import Policy, PolicyContext, PolicyError, make_policy, runtime_policies
from cache.shares import SCOPES

Event = tuple[int, list[int]]


class Timed(Policy):
    """Counts the seconds that are spent in another policy."""

    name = "timed"

    def __init__(self, inner: Policy) -> None:
        self._inner = inner
        self.seconds = 0.0

    def record_event(self, keys: Sequence[ExpertKey]) -> None:
        began = time.thread_time()
        self._inner.record_event(keys)
        self.seconds += time.thread_time() - began

    def admit(self, key: ExpertKey) -> None:
        began = time.thread_time()
        self._inner.admit(key)
        self.seconds += time.thread_time() - began

    def evict(self, key: ExpertKey) -> None:
        began = time.thread_time()
        self._inner.evict(key)
        self.seconds += time.thread_time() - began

    def victims(self, n: int, protected: Collection[ExpertKey], layer: int | None = None) -> list[ExpertKey] | None:
        began = time.thread_time()
        found = self._inner.victims(n, protected, layer)
        self.seconds += time.thread_time() - began
        return found

    def resident(self) -> set[ExpertKey]:
        return self._inner.resident()


def tokens(count: int, layers: int, experts: int, k: int, seed: int = 0) -> list[Event]:
    """Events of ``count`` tokens: in each layer most experts are the token's before, or favourites that drift."""
    draw = random.Random(seed)
    favourites = [draw.sample(range(experts), 4 * k) for _ in range(layers)]
    last = [draw.sample(range(experts), k) for _ in range(layers)]
    events = []
    for _ in range(count):
        for layer in range(layers):
            pool = draw.sample(last[layer], k // 2) + draw.sample(favourites[layer], 3 * k // 8)
            last[layer] = list(dict.fromkeys(pool + draw.sample(range(experts), 2 * k)))[:k]
            if draw.random() < 0.2:
                favourites[layer][draw.randrange(4 * k)] = draw.randrange(experts)
            events.append((layer, last[layer]))
    return events


def measure(spec: str, scope: str, events: Sequence[Event], layers: int, experts: int, slots: int) -> tuple[float, ...]:
    """Microseconds of an event in the policy and in cache and policy together, and the hit rate in percent.

    The first third of the events only fills the cache.
    """
    context = PolicyContext(scope, layers=layers, experts=experts)
    shared = range(layers) if scope == "layer" else None
    timed = Timed(make_policy(spec, context))
    caches = (ExpertCache(slots, timed, shared), ExpertCache(slots, make_policy(spec, context), shared))
    start = len(events) // 3
    seconds = 0.0
    for cache in caches:
        _serve(cache, events[:start])
        timed.seconds = 0.0 if cache is caches[0] else timed.seconds
        hits = cache.counters.decode.hits, cache.counters.decode.accesses
        began = time.thread_time()
        _serve(cache, events[start:])
        seconds = time.thread_time() - began
    counters = caches[1].counters.decode
    rate = (counters.hits - hits[0]) / (counters.accesses - hits[1])
    each = 1e6 / (len(events) - start)
    return timed.seconds * each, seconds * each, 100 * rate


def _serve(cache: ExpertCache, events: Sequence[Event]) -> None:
    for layer, experts in events:
        found = cache.lookup(layer, experts)
        if found.misses:
            for load in cache.reserve(found.misses):
                cache.commit(load.key)
        cache.end_event()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m cache.benchmark", description="Time the policies.")
    parser.add_argument("policies", nargs="*", metavar="POLICY", help="NAME or NAME:KEY=VALUE (default: all)")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--residency", type=float, default=0.25)
    asked = parser.parse_args(arguments)
    events = tokens(asked.tokens, asked.layers, asked.experts, asked.top_k)
    slots = max(asked.top_k * asked.layers, round(asked.residency * asked.layers * asked.experts))
    print(f"{'policy':14} {'scope':7} {'policy us':>10} {'in all us':>10} {'hit rate %':>11}")
    for spec in asked.policies or [name for name in runtime_policies() if name != "static"]:
        for scope in SCOPES:
            try:
                policy, total, rate = measure(spec, scope, events, asked.layers, asked.experts, slots)
            except PolicyError as error:
                print(f"benchmark: {error}", file=sys.stderr)
                return 2
            print(f"{spec:14} {scope:7} {policy:10.1f} {total:10.1f} {rate:11.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
