"""Golden counts: a trace of the demo model (its answer to a question of 43 tokens), replayed by every policy.

The numbers were written down once. Whoever changes them changes what a policy decides, and should know why.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cache.events import trace_events
from cache.policies import POLICIES
from cache.simulate import ReplaySettings, replay_events
from cache.trace import load_trace

DATA = Path(__file__).resolve().parents[1] / "data"
GOLDEN = json.loads((DATA / "demo-trace.golden.json").read_text("utf-8"))
SLOTS = (420, 540, 720)


def test_every_policy_has_golden_counts() -> None:
    assert set(GOLDEN) == {f"{name} {scope}" for name in POLICIES for scope in ("layer", "global")}


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_hits_and_misses(name: str) -> None:
    events = trace_events(load_trace(DATA / "demo-trace.npz"))
    training = events.where(events.decode) if name == "static" else None
    for scope in ("layer", "global"):
        found = []
        for slots in SLOTS:
            total = replay_events(events, ReplaySettings(name, slots, scope), training).total
            found.append([int(total.hits.sum()), int(total.misses.sum())])
        assert found == GOLDEN[f"{name} {scope}"], scope


def test_the_optimum_is_the_optimum() -> None:
    """Of those that admit what they fetch, where no event needs waves."""
    for scope in ("layer", "global"):
        best = GOLDEN[f"belady {scope}"][-1][0]
        assert all(counts[-1][0] <= best for key, counts in GOLDEN.items() if key.endswith(scope))
