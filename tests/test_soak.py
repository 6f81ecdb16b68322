"""Thousands of decoded tokens while all that can be changed live is changed at random: no wrong logit, no leak."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offload.config import SamplingSettings
from offload.engine import Engine
from offload.errors import BudgetError, UsageError
from offload.events import Done, LiveChanges, Token
from offload.memory.tier_plan import TierPlan
from offload.memory.tiers import TieredLoads
from tests.engines import finish, open_tiny
from tests.tiny_models import build_tiny

SPARE = 100  # an answer may end with text that is no token
TOKENS = 5000
PROMPTS = ("Once upon a time", "one two three four five", "The", "a b c d e f g h")
EVERY = 7
"""Decoded tokens between two changes, on average."""


class Logits:
    """Fingerprints of all logits that an engine's passes give, in order."""

    def __init__(self, engine: Engine) -> None:
        self.seen: list[int] = []
        real = engine._passes._once

        def watched(*args: bool) -> torch.Tensor:
            logits = real(*args)  # type: ignore[arg-type]
            self.seen.append(hash(logits[-1].float().numpy().tobytes()))
            return logits

        engine._passes._once = watched  # type: ignore[method-assign, assignment]


def answers(engine: Engine, tokens: int) -> Iterator[tuple[int, list[int]]]:
    """Ask on and on until ``tokens`` were decoded: gives the decoded tokens so far, and the logits after each token."""
    logits, done = Logits(engine), 0
    for number in range(10**6):
        sampling = SamplingSettings(temperature=1.2, max_new_tokens=60, seed=number, ignore_eos=True)
        for event in engine.generate(PROMPTS[number % len(PROMPTS)], sampling):
            if isinstance(event, Done):
                assert event.error is None
            done += isinstance(event, Token)
            yield done, logits.seen
        if done >= tokens:
            return


def random_change(engine: Engine, draw: random.Random) -> LiveChanges:
    name = draw.choice(["policy", "scope", "prefetch", "prefetch", "residency", "residency", "ram", "vram"])
    if name in engine.choices:
        return LiveChanges(**{name: draw.choice(engine.choices[name])})
    if name == "residency":
        return LiveChanges(residency=draw.choice([0.03, 0.1, 0.25, 0.5, 0.75, 1.0]))
    plan, more = engine.plan, draw.randint(-6, 12)
    size = plan.sizes.slot_bytes
    if name == "vram" and isinstance(plan, TierPlan):
        return LiveChanges(vram=plan.vram_budget + more * size)
    return LiveChanges(ram=plan.budget + more * size)


def check(engine: Engine, budgets: list[int]) -> None:
    """Nothing under way, nothing leaked: slots, pins, staging buffers, memory of the card."""
    runtime, plan = engine._runtime, engine.plan
    runtime.settle()
    runtime.cache.check_integrity()
    assert not runtime.cache._loading and not runtime._tickets and not runtime._ahead
    assert runtime.cache.slots == plan.slots == len(engine._storage.arena.available)
    loads = runtime.loads
    if isinstance(loads, TieredLoads):
        assert isinstance(plan, TierPlan)
        loads.tier.check_integrity()
        assert not loads.tier._pins and not loads.tier._loading
        assert loads.tier.slots == plan.host_slots
        assert len(loads.staging) == plan.staging
        memory = engine._device.memory()
        assert memory is not None and memory.used <= memory.budget
        budgets.append(memory.used - plan.slots * engine._storage.arena.slot_bytes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "architecture"), [("cpu", "qwen3_moe"), ("simulated", "qwen3_moe"), ("simulated", "qwen3_next")]
)
def test_soak(device: str, architecture: str, tmp_path: Path) -> None:
    tokens = TOKENS if architecture == "qwen3_moe" else TOKENS // 10
    folder = build_tiny(architecture, tmp_path / "checkpoint")
    with open_tiny(folder, tmp_path / "packs") as engine:
        expected: list[int] = []
        for _, seen in answers(engine, tokens + SPARE):
            expected = seen
    draw = random.Random(1)
    budgets: list[int] = []
    changed = refused = 0
    with open_tiny(folder, tmp_path / "packs", device=device, residency=0.5, tiers="exclusive") as engine:
        compared = 0
        for _, seen in answers(engine, tokens + SPARE):
            assert seen[compared:] == expected[compared : len(seen)], "no wrong logit"
            compared = len(seen)
            if draw.random() < 1 / EVERY:
                before = engine._settings
                try:
                    engine.change(change := random_change(engine, draw))
                    changed += 1
                    if change.prefetch is not None:
                        assert engine._settings == dataclasses.replace(before, prefetch=change.prefetch)
                except (UsageError, BudgetError):
                    refused += 1
                    assert engine._settings == before
            if draw.random() < 1 / 50:
                check(engine, budgets)
        check(engine, budgets)
        stats = engine.stats()
        assert stats.new_tokens >= tokens and compared == len(expected)
        assert changed > tokens / EVERY / 2 > refused, "most changes make sense"
        assert stats.experts.prefetched > tokens / 20
        assert max(budgets, default=0) - min(budgets, default=0) < 2**20, "memory of the card does not creep up"
        assert finish(engine.generate("The end", SamplingSettings(temperature=0, max_new_tokens=3)))[1].error is None
