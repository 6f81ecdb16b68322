"""``--prefetch auto`` on the clock of the simulated device: used where lanes are idle, off where the disk is saturated.

Nothing here depends on how fast this machine is: all seconds are those of the pretend one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cache.machines import load_machine
from offload.config import SamplingSettings
from offload.engine import Engine
from offload.events import LiveChanges, RunStats
from offload.memory.tiers import TieredLoads
from offload.model.prefetch import trial
from tests.engines import finish, open_tiny
from tests.tiny_models import build_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers that change the residual stream little, as in real models: a router then knows the next's choice."""
    folder = tmp_path_factory.mktemp("auto") / "checkpoint"
    sizes = {"num_hidden_layers": 3, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 16}
    build_tiny("qwen3_moe", folder, sizes=sizes)
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        for name, weight in weights.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight *= 0.1
        save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter tests: on a virtual clock tokens differ by their experts alone."""
    monkeypatch.setattr(trial, "WINDOW", 5)
    monkeypatch.setattr(trial, "FEWEST_PAIRS", 4)
    monkeypatch.setattr(trial, "MOST_PAIRS", 6)


def simulated(folder: Path, **rates: float) -> str:
    """A pretend machine with other rates."""
    machine = dataclasses.asdict(load_machine("rtx4060")) | {"name": "pretend"} | rates
    path = folder / "pretend.json"
    path.write_text(json.dumps(machine))
    return f"simulated:{path}"


IDLE = {"link_bytes_per_s": 2e8}
"""A record takes the link 60 us, and a layer's other work as long as several of them."""
SATURATED = {"disk_bytes_per_s": 1e7}
"""A record takes the disk 1.2 ms, and a token's compute less than that."""


def decoded(engine: Engine, tokens: int, seed: int = 1) -> RunStats:
    sampling = SamplingSettings(temperature=3.0, max_new_tokens=tokens, seed=seed, ignore_eos=True)
    return finish(engine.generate("one two three", sampling))[1].stats


def open_on(device: str, checkpoint: Path, tmp_path: Path, **settings: object) -> Engine:
    """Misses are fetched: computed where they lie, they would leave the link idle, and prefetching nothing to do."""
    settings = {"residency": 0.25, "context_tokens": 512, "miss": "fetch"} | settings
    return open_tiny(checkpoint, tmp_path / "packs", device=device, **settings)


def without_ram(engine: Engine) -> None:
    """Nothing stays in RAM: every miss is read from disk."""
    loads = engine._runtime.loads
    assert isinstance(loads, TieredLoads)
    loads.resize_host(0)


def test_it_wins_where_the_lanes_are_idle(quick: None, checkpoint: Path, tmp_path: Path) -> None:
    device = simulated(tmp_path, **IDLE)
    with open_on(device, checkpoint, tmp_path, prefetch="auto") as engine:
        stats = decoded(engine, 160)
        found = stats.prefetch_auto
        assert found is not None and stats.prefetch == "auto" and stats.virtual
        assert found.choice == "next-gate"
        gain = next(gain for gain in found.gains if gain.prefetch == "next-gate")
        assert gain.gain > 0.05 and gain.error is not None and gain.gain > 2 * gain.error
        assert stats.to_json()["prefetch_auto"]["choice"] == "next-gate"
        assert engine.snapshot().stats.prefetch_auto == found
        engine._runtime.cache.check_integrity()
        used = decoded(engine, 20)
        assert used.experts.prefetch_used > 0
        assert used.decode_tokens_per_s is not None and gain.off_tokens_per_s is not None
        assert used.decode_tokens_per_s > gain.off_tokens_per_s


def test_it_is_off_on_a_saturated_disk(quick: None, checkpoint: Path, tmp_path: Path) -> None:
    device = simulated(tmp_path, **SATURATED)
    with open_on(device, checkpoint, tmp_path, prefetch="auto") as engine:
        without_ram(engine)
        for seed in itertools.count():  # other tokens each time, or windows would go by what is in the text
            decoded(engine, 40, seed)
            if engine._runtime.predictor.trial.rounds:  # type: ignore[union-attr]
                break
        found = engine.stats().prefetch_auto
        assert found is not None and found.choice == "off" and found.testing is None
        assert {gain.prefetch for gain in found.gains} == {"next-gate", "layer-markov"}
        assert found.gains[0].prefetch == "next-gate" and found.gains[0].gain < -0.02
        before = engine.stats().experts.prefetched
        decoded(engine, 10)
        assert engine.stats().experts.prefetched == before


def test_a_live_change_tests_anew(quick: None, checkpoint: Path, tmp_path: Path) -> None:
    with open_on(simulated(tmp_path, **IDLE), checkpoint, tmp_path) as engine:
        engine.change(LiveChanges(prefetch="auto"))
        stats = decoded(engine, 24)
        assert stats.prefetch == "auto"
        assert stats.prefetch_auto is not None and stats.prefetch_auto.testing == "next-gate"
        assert stats.prefetch_auto.gains
        engine.change(LiveChanges(residency=0.5))
        found = engine.stats().prefetch_auto
        assert found is not None and found.gains == () and found.testing is None
        engine.change(LiveChanges(prefetch="off"))
        assert engine.stats().prefetch_auto is None
