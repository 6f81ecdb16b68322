"""Decoding with graphs, on the simulated device: the same answers with one launch between two experts modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from offload.config import EngineSettings, SamplingSettings
from offload.devices.confirmed import confirm, confirmed_file, is_confirmed, withdraw
from offload.engine import Engine, open_engine
from offload.errors import ExpertFileError, UsageError
from offload.events import Done, Event, GraphUse, LiveChanges, Notice
from offload.memory.tier_plan import TierPlan
from offload.model.experts import ExpertRuntime
from tests.engines import finish, open_tiny
from tests.tiny_models import TINY_ARCHITECTURES, build_tiny

PROMPT = [3, 9, 27, 81, 11, 12]
QUICK = ("qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next")
WITHOUT = {  # and why
    "phimoe": "the host waits", "jetmoe": "the host waits",
    "hy_v4": "DynamicIndexedLayer", "deepseek_v32": "DynamicIndexedLayer", "deepseek_v4": "DeepseekV4HCACache",
    "inkling_text": "LinearAttentionAndSlidingWindow", "inkling2_text": "LinearAttentionAndSlidingWindow",
    "zaya": "LinearAttentionAndFullAttention",
}  # fmt: skip
FAMILIES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in TINY_ARCHITECTURES
    if name not in WITHOUT
] + [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_vl_moe", "gemma4", "step3p7", "granitemoe_swa")]


def opened(checkpoint: Path, packs: Path, graphs: str = "on", **settings: Any) -> Engine:
    return open_tiny(checkpoint, packs, **{"device": "simulated", "residency": 0.5, "graphs": graphs} | settings)


def answer(engine: Engine, tokens: int, prompt: list[int] = PROMPT) -> list[torch.Tensor]:
    """The logits of ``prompt``'s last token, and of so many more, each the likeliest."""
    engine.reset()
    found = [engine._passes.run(prompt, decode=False)[-1]]
    for _ in range(tokens):
        found.append(engine._passes.run([int(found[-1].argmax())], decode=True)[-1])
    return found


def use_of(engine: Engine) -> GraphUse:
    use = engine.stats().graphs
    assert use is not None
    return use


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    """Whether the answers are the same, token for token, and the logits but for rounding."""
    for one, other in zip(ours, theirs, strict=True):
        if one.argmax() != other.argmax() or (one - other).abs().max() > 1e-5 * other.abs().max().clamp(min=1):
            return False
    return True


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("qwen3_moe", tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose layers see 8 tokens, or all."""
    return build_tiny("gpt_oss", tmp_path_factory.mktemp("tiny") / "windows", sizes={"sliding_window": 8})


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_answer_with_one_launch_between_experts(family: str, tmp_path: Path) -> None:
    checkpoint = build_tiny(family, tmp_path / "checkpoint")
    with opened(checkpoint, tmp_path, "off") as engine:
        expected = answer(engine, 5)
        assert use_of(engine) == GraphUse(False, "--graphs off")
    with opened(checkpoint, tmp_path) as engine:
        first, second = answer(engine, 5), answer(engine, 5)
        modules, use = len(engine._modules), use_of(engine)
    assert close(first, expected)
    assert equal(first, second), "the first token ran without graphs, the second was recorded, the others replayed"
    assert (use.used, use.reason, use.graphs, use.tokens) == (True, None, modules + 1, 8)
    assert use.operations > 20 * modules


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(WITHOUT))
def test_a_family_that_cannot_be_recorded_says_why(family: str, tmp_path: Path) -> None:
    checkpoint = build_tiny(family, tmp_path / "checkpoint")
    with opened(checkpoint, tmp_path, "off") as engine:
        expected = answer(engine, 3)
    with opened(checkpoint, tmp_path) as engine:
        assert equal(answer(engine, 3), expected)
        use = use_of(engine)
        assert not use.used and use.reason is not None and WITHOUT[family] in use.reason
        assert [notice.text for notice in engine._passes.notices] == [
            f"no graphs: {use.reason}; the skeleton's operations are launched one by one"
        ]


def test_a_longer_answer_takes_more_of_the_kv_cache(
    checkpoint: Path, packs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.model.graphs._LEAST_SIZE", 8)
    with opened(checkpoint, packs, "off") as engine:
        expected = answer(engine, 20)
    with opened(checkpoint, packs) as engine:
        recorded = []
        record = engine._passes._graphs._record  # type: ignore[union-attr]

        def counted(cache: Any) -> torch.Tensor:
            recorded.append(cache.size)
            return record(cache)

        monkeypatch.setattr(engine._passes._graphs, "_record", counted)
        first = answer(engine, 20)
        assert close(first, expected)
        assert recorded == [8, 16, 32], "each size once"
        assert equal(answer(engine, 20), first), "what was said before does not matter"
        assert recorded == [8, 16, 32, 8, 16, 32] and use_of(engine).tokens == 40 - 3 - 6


@pytest.mark.parametrize("kind", ["dynamic", "fp8"])
def test_prompts_and_answers_take_turns(kind: str, windows: Path, packs: Path) -> None:
    """What graphs have added to the cache is there for the next prompt; 8 tokens leave the windows on the way."""

    def conversation(engine: Engine) -> list[torch.Tensor]:
        found = answer(engine, 6)
        for prompt in ([7, 8, 9], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39]):
            found.append(engine._passes.run(prompt, decode=False)[-1])
            for _ in range(6):
                found.append(engine._passes.run([int(found[-1].argmax())], decode=True)[-1])
        return found

    with opened(windows, packs, "off", kv_cache=kind) as engine:
        expected = conversation(engine)
    with opened(windows, packs, kv_cache=kind) as engine:
        assert close(conversation(engine), expected)
        assert use_of(engine).tokens == 16


def test_the_last_tokens_can_be_forgotten(checkpoint: Path, packs: Path) -> None:
    with opened(checkpoint, packs) as engine:
        before = answer(engine, 6)
        tokens = list(engine._kv.tokens)
        engine._kv.truncate(len(tokens) - 3)
        again = [engine._passes.run([token], decode=True)[-1] for token in tokens[-3:]]
        assert equal(again, before[-3:]) and use_of(engine).tokens == 7


@pytest.mark.parametrize("when", ["watched", "recorded", "replayed"])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
def test_experts_that_fail_leave_the_conversation_as_it_was(
    family: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = build_tiny(family, tmp_path / "checkpoint")
    done = {"watched": 0, "recorded": 1, "replayed": 3}[when]
    with opened(checkpoint, tmp_path) as engine:
        expected = answer(engine, 6)
    with opened(checkpoint, tmp_path) as engine:
        found = answer(engine, done)
        token, run = int(found[-1].argmax()), ExpertRuntime.run

        def fails(self: ExpertRuntime, module: Any, layer: int, *given: Any) -> torch.Tensor:
            if layer == 2:
                raise ExpertFileError("as if")
            return run(self, module, layer, *given)

        with monkeypatch.context() as patch:
            patch.setattr(ExpertRuntime, "run", fails)
            with pytest.raises(ExpertFileError, match="as if"):
                engine._passes.run([token], decode=True)
        assert use_of(engine).used and not engine._passes.notices
        if family == "qwen3_next":  # recurrent states have moved on: the conversation begins anew
            assert engine._kv.tokens == []
            found = answer(engine, done)
        while len(found) < len(expected):
            found.append(engine._passes.run([int(found[-1].argmax())], decode=True)[-1])
        assert equal(found[:7], expected) if family == "qwen3_moe" else close(found, expected)
        assert use_of(engine).tokens > 0


def test_memory_that_is_refused_costs_slots_or_the_graphs(
    checkpoint: Path, packs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(checkpoint, packs, "off") as engine:
        expected = answer(engine, 6)
    with opened(checkpoint, packs) as engine:
        slots = engine.plan.slots
        answer(engine, 0)
        device = engine._device
        monkeypatch.setattr(device, "free_memory", iter([2**40, 0]).__next__)
        assert close(answer(engine, 6), expected) and engine.plan.slots == slots
        use = use_of(engine)
        assert not use.used and use.reason is not None and use.reason.startswith("they take 1024.00 GiB, and the plan")


def test_captures_that_fail_change_nothing(checkpoint: Path, packs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(checkpoint, packs, "off") as engine:
        expected = answer(engine, 6)
    with opened(checkpoint, packs) as engine:
        ends = []
        end = engine._passes._graphs._recorder.end  # type: ignore[union-attr]

        def breaks() -> Any:
            ends.append(end())
            if len(ends) == 3:
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
            return ends[-1]

        monkeypatch.setattr(engine._passes._graphs._recorder, "end", breaks)  # type: ignore[union-attr]
        found = answer(engine, 6)
        use = use_of(engine)
        assert close(found, expected) and not use.used
        assert use.reason == "RuntimeError: CUDA error: operation not permitted when stream is capturing"


def test_changes_between_tokens_do_not_matter(checkpoint: Path, packs: Path) -> None:
    with opened(checkpoint, packs) as engine:
        expected = answer(engine, 8)
        engine.reset()
        found = [engine._passes.run(PROMPT, decode=False)[-1]]
        changes: list[dict[str, Any]] = [{"residency": 0.2}, {"miss": "fetch"}, {"prefetch": "next-gate"}]
        for change in ({}, *changes, {"residency": 1.0}, {}):
            if change:
                engine.change(LiveChanges(**change))
            found.append(engine._passes.run([int(found[-1].argmax())], decode=True)[-1])
        assert equal(found, expected[: len(found)])


def test_an_answer_says_how_it_was_made(checkpoint: Path, packs: Path) -> None:
    greedy = SamplingSettings(temperature=0, max_new_tokens=8)
    texts, seconds = [], []
    for graphs in ("off", "on"):
        with opened(checkpoint, packs, graphs, residency=1.0) as engine:
            finish(engine.generate("Once upon a time", greedy))
            engine.reset()
            _, done = finish(engine.generate("Once upon a time", greedy))
            texts.append(done.text)
            assert done.stats.decode_tokens_per_s is not None
            seconds.append(1 / done.stats.decode_tokens_per_s)
            assert isinstance(engine.plan, TierPlan)
            rows = {what: size for what, size, _ in engine.plan.vram_rows()}
            assert ("graphs" in rows) is (graphs == "on")
            assert sum(rows.values()) == engine.plan.vram_budget
    assert texts[0] == texts[1]
    stats = done.stats.to_json()["graphs"]
    assert set(stats) == {"used", "reason", "graphs", "operations", "tokens", "held_bytes"} and stats["tokens"] == 12
    saved = (stats["operations"] - stats["graphs"]) * engine._device.machine.launch_s  # type: ignore[union-attr]
    assert seconds[0] - seconds[1] > 0.8 * saved, "on the virtual clock"


def notices(checkpoint: Path, packs: Path, **settings: Any) -> tuple[list[str], GraphUse | None]:
    said: list[Event] = []
    asked = EngineSettings(model=str(checkpoint), context_tokens=128, experts_dir=packs, **settings)
    with open_engine(asked, said.append) as engine:  # type: ignore[arg-type]
        use = engine.stats().graphs
    return [event.text for event in said if isinstance(event, Notice) and "graphs" in event.text], use


def test_a_cpu_has_nothing_to_launch(checkpoint: Path, packs: Path) -> None:
    line = "--graphs on: there is nothing to choose on a CPU: its operations are called, not launched"
    assert notices(checkpoint, packs, device="cpu", graphs="on") == ([line], None)
    assert notices(checkpoint, packs, device="cpu") == ([], None)
    with pytest.raises(UsageError, match="--graphs: 'yes' is not one of auto, on, off"):
        EngineSettings(graphs="yes")


def test_auto_waits_for_a_confirmation(
    checkpoint: Path, packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUN_LOCAL_CACHE", str(tmp_path))
    assert notices(checkpoint, packs, device="simulated") == (
        [], GraphUse(False, "auto: there is no card to try them on"),
    )  # fmt: skip
    monkeypatch.setattr("offload.devices.simulated.SimulatedDevice.card", lambda self: "a card, torch 2")
    reason = "auto: tests/gpu has not confirmed them on a card, torch 2"
    assert notices(checkpoint, packs, device="simulated")[1] == GraphUse(False, reason)
    confirm("a card, torch 1", {})
    assert not is_confirmed("a card, torch 2")
    assert confirm("a card, torch 2", {"tokens_per_s": 5}) == confirmed_file()
    used = notices(checkpoint, packs, device="simulated")[1]
    assert used is not None and used.used
    withdraw("a card, torch 2")
    assert is_confirmed("a card, torch 1") and not is_confirmed("a card, torch 2")
    confirmed_file().write_text("[")
    assert notices(checkpoint, packs, device="simulated")[1] == GraphUse(False, reason)


def test_rows_of_a_batch_share_passes(checkpoint: Path, packs: Path) -> None:
    with opened(checkpoint, packs, batch_rows=2) as engine:
        assert use_of(engine) == GraphUse(False, "rows of a batch share passes") and engine.plan.sizes.graph_bytes == 0


def test_done_names_them(checkpoint: Path, packs: Path) -> None:
    with opened(checkpoint, packs) as engine:
        _, done = finish(engine.generate("Once", SamplingSettings(temperature=0, max_new_tokens=5)))
        assert isinstance(done, Done) and done.stats.graphs is not None and done.stats.graphs.tokens == 2
