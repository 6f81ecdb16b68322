"""Measures ``--host-policy``: which share of the records that the device lacks is found in RAM.

``python -m tests.cache.measure_host_policies [TRACE]`` replays a trace (default: a made one of Qwen3-30B-A3B) through
both tiers, in the runtime's order, with ``foresight`` for the slots. ``/ all`` is a policy that sees every event; the
others see what the device lacks.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

from cache.events import Events, trace_events
from cache.expert_cache import ExpertCache, Lookup
from cache.host_tier import HostTier
from cache.policies import PolicyContext, make_policy
from cache.shares import even_share
from cache.synthetic import MODELS, synthetic_trace
from cache.trace import load_trace

POLICIES = ("lru", "slru", "lfu", "ewma", "foresight")
SIZES = ((0.125, 0.25), (0.125, 0.5), (0.25, 0.5))
"""Shares of all experts: slots, and records that fit RAM."""


class Tiers:
    """``misses`` and ``reads`` are those of decoded tokens."""

    def __init__(self, events: Events, slots: float, host: float, policy: str, exclusive: bool, told: str) -> None:
        layers, experts = len(events.layers()), int(events.experts.max()) + 1
        context = PolicyContext("global", 0, layers=layers, experts=experts)
        count = round(layers * experts * slots)
        self.cache = ExpertCache(
            count, make_policy("foresight", context), None, even_share(count, layers), layers * experts
        )
        self.tier = HostTier(round(layers * experts * host), make_policy(policy, context))
        self.exclusive, self.told = exclusive, told
        self.misses = self.reads = 0

    def run(self, events: Events) -> float:
        rows = zip(events.layer.tolist(), events.decode.tolist(), events.sets(), strict=True)
        for number, (layer, decode, experts) in enumerate(rows):
            found = self.cache.lookup(layer, experts, decode=decode, recent=events.recent.get(number))
            self.tier.record_event([*found.hits, *found.misses] if self.told == "all" else found.misses)
            self._load(found, decode)
            self.cache.end_event()
        return 1 - self.reads / max(1, self.misses)

    def _load(self, found: Lookup, decode: bool) -> None:
        waiting = list(found.misses)
        for hit in (None, *found.hits):
            if hit is not None and waiting:
                self.cache.release(hit)
            while waiting and (loads := self.cache.reserve(waiting)):
                for key, _, victim in loads:
                    waiting.remove(key)
                    if victim is not None and self.exclusive:
                        self.tier.demote(victim)
                    here = self.tier.find(key) is not None
                    self.misses += decode
                    self.reads += decode and not here
                    if here and self.exclusive:
                        self.tier.drop(key)
                    elif not here and not self.exclusive and self.tier.reserve(key):
                        self.tier.commit(key)
                    self.cache.commit(key)
                    if waiting:
                        self.cache.release(key)


def main() -> None:
    if len(sys.argv) > 1:
        events = trace_events(load_trace(Path(sys.argv[1])))
        events = events.where(events.request < 3)
    else:
        events = trace_events(synthetic_trace(replace(MODELS["qwen3-30b-a3b"], requests=3, tokens=48)))
    print("| slots | RAM | tiers |", " | ".join((*POLICIES, "ewma / all", "foresight / all")), "|")
    print("| --- " * (5 + len(POLICIES)) + "|")
    ways = [*((policy, "lacking") for policy in POLICIES), ("ewma", "all"), ("foresight", "all")]
    for (slots, host), exclusive in product(SIZES, (False, True)):
        found = [Tiers(events, slots, host, policy, exclusive, told).run(events) for policy, told in ways]
        row = " | ".join(f"{100 * share:.1f}" for share in found)
        print(f"| {slots:.1%} | {host:.0%} | {'exclusive' if exclusive else 'inclusive'} | {row} |", flush=True)


if __name__ == "__main__":
    main()
