"""Graphs on a real card: the same answers, no more memory with every token, fewer launches. What ``--graphs auto`` goes
by: a card on which all of this file passes is remembered in the user's cache folder, one on which it fails forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.config import SamplingSettings
from offload.devices import get_device
from offload.devices.confirmed import confirm, withdraw
from offload.engine import Engine
from offload.events import GraphUse
from tests.conftest import _USER_CACHE
from tests.engines import finish, open_tiny
from tests.tiny_models import build_tiny

TOKENS = 300  # from 256 places of the KV cache to 512
FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next")
PASSED: set[str] = set()  # families, in this run
PROMPT = [3, 9, 27, 81, 11, 12]


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs") / request.param
    return build_tiny(request.param, folder)  # in float32: in bfloat16 rounding may choose another expert


@pytest.fixture
def user_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tests have a cache of their own; what is found here is for the user's."""
    monkeypatch.setenv("RUN_LOCAL_CACHE", str(_USER_CACHE))
    yield _USER_CACHE


def opened(checkpoint: Path, packs: Path, graphs: str, **settings: Any) -> Engine:
    settings = {"residency": 1.0, "context_tokens": 512} | settings
    return open_tiny(checkpoint, packs, device="cuda", graphs=graphs, **settings)


def decode(engine: Engine, tokens: list[int]) -> list[torch.Tensor]:
    engine.reset()
    found = [engine._passes.run(PROMPT, decode=False)[-1]]
    return found + [engine._passes.run([token], decode=True)[-1] for token in tokens]


def use_of(engine: Engine) -> GraphUse:
    use = engine.stats().graphs
    assert use is not None
    return use


def launches(engine: Engine, token: int) -> tuple[int, int]:
    """Kernels and graphs that the host launches for one token."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        engine._passes.run([token], decode=True)
        torch.cuda.synchronize()
    counts = {event.key: event.count for event in profile.key_averages()}
    kernels = sum(count for name, count in counts.items() if "LaunchKernel" in name)
    return kernels, sum(count for name, count in counts.items() if "GraphLaunch" in name)


def largest_error(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The difference, as a part of the largest logit."""
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True)]
    return float(max(errors))


def compared(tiny: Path, packs: Path, report: list[str]) -> None:
    fixed = [(17 * number) % 200 + 10 for number in range(TOKENS)]
    for graphs, used in (("off", False), ("on", True)):
        with opened(tiny, packs, graphs) as engine:
            logits = decode(engine, fixed)
            if not used:
                expected, eager = logits, launches(engine, 5)
                continue
            use = use_of(engine)
            assert use.used, use.reason
            error = largest_error(logits, expected)
            first, again = logits, decode(engine, fixed)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "the same every time"
            before = torch.cuda.memory_reserved()
            decode(engine, fixed)
            grown = torch.cuda.memory_reserved() - before
            kernels, replays = launches(engine, 5)
            held = use_of(engine).held_bytes
    report.append(
        f"{tiny.name}: logits differ by {error:.1e}; launches for a token: {eager[0]} without, {kernels} and "
        f"{replays} graphs with; the graphs of {use.operations} operations hold {held / 2**20:.1f} MiB; "
        f"{TOKENS} more tokens took {grown / 2**20:.1f} MiB"
    )
    assert error < 1e-3 and grown == 0
    assert replays == use.graphs and kernels < eager[0]


def test_the_answers_are_the_same(tiny: Path, packs: Path, report: list[str]) -> None:
    compared(tiny, packs, report)
    PASSED.add(tiny.name)


def test_slots_and_prompts_between_answers(packs: Path, tmp_path: Path) -> None:
    checkpoint = build_tiny("qwen3_moe", tmp_path / "checkpoint")  # in float32, too
    greedy = SamplingSettings(temperature=0, max_new_tokens=40)
    texts = []
    for graphs in ("off", "on"):
        with opened(checkpoint, packs, graphs, residency=0.2) as engine:
            said = []
            for prompt in ("Once upon a time", "Once upon a time there was", "and then"):
                _, done = finish(engine.generate(prompt, greedy))
                said.append(done.text)
            memory = engine.stats().memory
            assert memory.vram_peak_bytes is not None and memory.vram_budget_bytes is not None
            assert memory.vram_peak_bytes <= memory.vram_budget_bytes
        texts.append(said)
    assert texts[0] == texts[1]
    PASSED.add("answers")


def test_tokens_a_second_and_the_confirmation(packs: Path, tmp_path: Path, user_cache: Path, report: list[str]) -> None:
    """The last of this file."""
    checkpoint = build_tiny("qwen3_moe", tmp_path / "checkpoint", dtype=torch.bfloat16, sizes={"num_hidden_layers": 24})
    rates, held = {}, 0
    for graphs in ("off", "on"):
        with opened(checkpoint, packs, graphs) as engine:
            sampling = SamplingSettings(temperature=0, max_new_tokens=128, ignore_eos=True)
            finish(engine.generate("Once upon a time", sampling))
            engine.reset()
            _, done = finish(engine.generate("Once upon a time", sampling))
            rates[graphs] = done.stats.decode_tokens_per_s or 0.0
            held = use_of(engine).held_bytes
    card = get_device("cuda").card()
    assert card is not None
    withdraw(card)
    report.append(f"24 tiny layers: {rates['off']:.1f} tokens/s without graphs, {rates['on']:.1f} with")
    assert {*FAMILIES, "answers"} == PASSED, "not confirmed: the other tests of this file must pass in the same run"
    assert rates["on"] > rates["off"]
    figures = {f"tokens_per_s_{name}": round(rate, 1) for name, rate in rates.items()} | {"held_bytes": held}
    report.append(f"--graphs auto uses graphs on {card} from now on ({confirm(card, figures)})")
