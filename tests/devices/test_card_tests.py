"""What is in tests/gpu for a real card, on a ``torch.cuda`` whose card is the CPU: they must not fail by a slip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache.machines import load_machine
from cache.misses import MissRates
from tests.devices.test_cuda_engine import CpuAsCard, card
from tests.gpu import test_card
from tests.tiny_models import build_tiny

__all__ = ["card"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("card")
    build_tiny("qwen3_moe", made / "checkpoint")
    return made


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("test", "arguments"),
    [
        (test_card.test_the_ways_of_misses_give_the_same_numbers, {"format": "native", "report": []}),
        (test_card.test_the_way_of_misses_and_the_policies_change_live, {}),
        (test_card.test_little_ram_behind_the_card, {"tiers": "exclusive", "host_policy": "foresight"}),
        (test_card.test_little_ram_behind_the_card, {"tiers": "inclusive", "host_policy": "lru"}),
        (test_card.test_the_same_sum_every_time_without_the_grouped_kernels, {}),
        (test_card.test_vram_used_and_its_budget_can_be_compared, {}),
        (test_card.test_the_cpu_computes_beside_copies, {"report": []}),
        (test_card.test_memory_that_is_refused_costs_slots, {}),
        (test_card.test_budgets_change_between_tokens, {}),
    ],
)
def test_it_runs(
    test: Callable[..., None], arguments: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = MissRates.of_machine(load_machine("rtx4060"))
    monkeypatch.setattr(CpuAsCard, "miss_rates", lambda *_: rates)  # measured with the card's own timers elsewhere
    test(checkpoint=folder / "checkpoint", packs=folder, **arguments)
