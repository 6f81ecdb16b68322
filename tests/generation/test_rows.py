"""Batches on real tiny models: many rows share forward passes, and each answers as it would alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.config import SamplingSettings
from offload.engine import Engine
from offload.errors import ContextError, ExpertFileError, UsageError
from offload.events import Notice, RowDone, RowsPass, RunStats
from offload.protocol import PreparedRow
from tests.engines import finish, open_tiny
from tests.model.row_error import measure
from tests.tiny_models import build_tiny

SYSTEM = "You are a helpful assistant that answers in few words. "


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def build(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = build_tiny(architecture, tmp_path_factory.mktemp(architecture) / "checkpoint")
        return made[architecture]

    return build


def prompts(count: int) -> list[tuple[str, SamplingSettings]]:
    """Ragged prompts and answers; every third row samples with a seed of its own."""
    rows = []
    for number in range(count):
        sampled: dict[str, Any] = {"temperature": 0.9, "seed": number} if number % 3 == 2 else {"temperature": 0}
        text = f"{number}: " + "the slot and the disk " * (number * 5 % 4)
        rows.append((text, SamplingSettings(max_new_tokens=3 + number * 7 % 10, **sampled)))
    return rows


def answer_rows(
    engine: Engine,
    rows: list[PreparedRow],
    on_pass: Callable[[RowsPass], None] = lambda event: None,
    on_notice: Callable[[Notice], None] = lambda event: None,
) -> dict[int, RowDone]:
    """Give the rows in order, each as soon as it fits; returns the ends by row."""
    left: Iterator[PreparedRow] = iter(rows)
    held: list[PreparedRow] = []

    def take(room: int) -> PreparedRow | None:
        if not held and (row := next(left, None)) is not None:
            held.append(row)
        return held.pop() if held and held[0].most_tokens(engine.context_tokens) <= room else None

    ends = {}
    for event in engine.generate_rows(take):
        if isinstance(event, RowDone):
            assert event.row not in ends
            ends[event.row] = event
        elif isinstance(event, Notice):
            on_notice(event)
        else:
            on_pass(event)
    return ends


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("olmoe", {}),
        ("gpt_oss", {}),  # eager attention with sinks, sliding windows
        ("deepseek_v3", {}),  # keys made from cached latent states
        ("qwen3_moe", {"format": "int4", "dense_format": "int8", "kv_cache": "fp8"}),
        ("grok-1", {}),  # eager attention of our own, scores squeezed
    ],
)
def test_every_row_answers_as_it_does_alone(
    architecture: str, settings: dict[str, str], checkpoints: Callable[[str], Path], packs: Path
) -> None:
    rows = prompts(12)
    with open_tiny(checkpoints(architecture), packs, residency=0.3, **settings) as engine:
        alone = [finish(engine.generate(*row))[1] for row in rows]
    with open_tiny(
        checkpoints(architecture), packs, residency=0.3, batch_rows=5, prefill_chunk=24, **settings
    ) as engine:
        assert engine.rows_at_once == 5
        passes: list[RowsPass] = []
        ends = answer_rows(engine, [engine.prepare(*row) for row in rows], passes.append)
        for number, done in enumerate(alone):
            end = ends[number]
            assert (end.text, end.reason, end.new_tokens) == (done.text, done.reason, done.new_tokens)
            assert end.prompt_tokens == done.prompt_tokens
        assert max(event.running for event in passes) == 5
        stats = engine.stats()
        assert stats.new_tokens == sum(done.new_tokens for done in alone)
        assert stats.prompt_tokens == sum(done.prompt_tokens for done in alone)
        finish(engine.generate(*rows[0]))  # and it still answers single questions
        again = answer_rows(engine, [engine.prepare(*row) for row in rows[:2]])
        assert again[1].text == alone[1].text


@pytest.mark.parametrize(
    ("dtype", "settings", "most"),
    [
        (torch.float32, {}, 4e-6),
        (torch.float32, {"format": "int4", "dense_format": "int8"}, 4e-6),
        (torch.bfloat16, {"format": "int4", "dense_format": "int8"}, 0.1),
    ],
)
def test_tokens_are_equal_wherever_the_best_is_ahead_by_more_than_the_error(
    dtype: torch.dtype, settings: dict[str, str], most: float, tmp_path: Path
) -> None:
    """``most`` is the error that was measured, relative to the largest logit (docs/batch.md)."""
    folder = build_tiny("olmoe", tmp_path / "checkpoint", dtype=dtype)
    with open_tiny(folder, tmp_path, residency=0.5, **settings) as engine:
        rows, _ = measure(engine, [engine.encode(text) for text, _ in prompts(9)], 12)
        assert rows.positions == 9 * 12
        assert rows.error <= most * rows.largest
        assert rows.lost_gap <= most * rows.largest


def test_an_expert_is_read_once_for_all_rows_of_a_pass(checkpoints: Callable[[str], Path], packs: Path) -> None:
    with open_tiny(checkpoints("olmoe"), packs, residency=1e-9, batch_rows=6) as engine:  # one slot: nothing is held
        rows = [engine.prepare("the same length", SamplingSettings(temperature=0, max_new_tokens=6))] * 6
        answer_rows(engine, rows)
        stats = engine.stats()
        counters = engine._runtime.cache.counters
        reads = stats.bytes.disk_read // engine.plan.sizes.slot_bytes
        assert reads <= counters.prefill.misses + counters.decode.misses + stats.experts.read_ahead
        assert stats.experts.read_ahead - stats.experts.read_ahead_used <= 1 + 0.03 * reads
        layers, passes = 4, engine._passes.forwards
        assert stats.experts.events == layers * passes
        assert stats.experts.accesses <= layers * passes * 8
        assert stats.decode_passes == 5
        # equal rows choose equal experts: as many accesses as one row would have
        assert counters.decode.accesses == layers * 5 * 2


def test_prompts_and_rows_read_what_they_need_and_hardly_more(tmp_path: Path, packs: Path) -> None:
    sizes = {
        "num_hidden_layers": 8,
        "num_experts": 64,
        "num_local_experts": 64,
        "num_experts_per_tok": 8,
        "intermediate_size": 16,
    }
    checkpoint = build_tiny("olmoe", tmp_path / "checkpoint", sizes=sizes)
    with open_tiny(checkpoint, packs, residency=0.5, batch_rows=8, prefill_chunk=96) as engine:
        long = SamplingSettings(temperature=1, seed=1, max_new_tokens=24, ignore_eos=True)
        laps: list[RunStats] = []
        passes = 0

        def on_pass(event: RowsPass) -> None:
            nonlocal passes
            passes += 1
            if passes == 1 + 8 * 40 // 96:
                laps.append(engine.lap())

        rows = [replace(engine.prepare("x", long), ids=tuple(range(10 + n, 50 + n))) for n in range(8)]
        for repeat in range(2):
            passes = 0
            answer_rows(engine, rows, on_pass)
            laps.append(engine.lap())
            assert passes > 24 + repeat
    for prompts, decoded in (laps[:2], laps[2:]):
        assert prompts.prefill_passes == 4 and decoded.decode_passes > 20
    for lap in laps[1:]:  # the first fills the slots
        assert lap.bytes.needed is not None and lap.bytes.needed > 0
        assert lap.bytes.needed <= lap.bytes.disk_read <= 1.05 * lap.bytes.needed


def test_equal_rows_get_equal_answers(checkpoints: Callable[[str], Path], packs: Path) -> None:
    with open_tiny(checkpoints("olmoe"), packs, batch_rows=4) as engine:
        rows = [engine.prepare("all the same", SamplingSettings(temperature=0, max_new_tokens=12))] * 9
        assert len({end.text for end in answer_rows(engine, rows).values()}) == 1


def test_one_row_and_no_row(checkpoints: Callable[[str], Path], packs: Path) -> None:
    with open_tiny(checkpoints("olmoe"), packs, batch_rows=4) as engine:
        assert answer_rows(engine, []) == {}
        row = engine.prepare("alone", SamplingSettings(temperature=0, max_new_tokens=4))
        assert answer_rows(engine, [row])[0].new_tokens > 0


def test_a_row_longer_than_the_context_is_refused_and_a_long_one_ends_there(
    checkpoints: Callable[[str], Path], packs: Path
) -> None:
    with open_tiny(checkpoints("olmoe"), packs, batch_rows=4, context_tokens=64) as engine:
        with pytest.raises(ContextError):
            engine.prepare("x" * 300, SamplingSettings())
        with pytest.raises(UsageError):
            engine.prepare("", SamplingSettings())
        row = engine.prepare("x y z " * 5, SamplingSettings(temperature=1, seed=3, max_new_tokens=500, ignore_eos=True))
        end = answer_rows(engine, [row])[0]
        assert (end.reason, end.prompt_tokens + end.new_tokens) == ("length", 64)


@pytest.mark.parametrize("kv_cache", ["dynamic", "fp8"])
def test_a_shared_beginning_is_computed_once(kv_cache: str, checkpoints: Callable[[str], Path], packs: Path) -> None:
    greedy = SamplingSettings(temperature=0, max_new_tokens=6)
    texts = [SYSTEM + f"Question {number}" for number in range(8)]
    with open_tiny(checkpoints("olmoe"), packs, kv_cache=kv_cache) as engine:
        engine.generate("x", greedy)
        alone = []
        for text in texts:
            engine.reset()
            alone.append(finish(engine.generate(text, greedy))[1].text)
    with open_tiny(checkpoints("olmoe"), packs, batch_rows=3, kv_cache=kv_cache) as engine:
        rows = [engine.prepare(text, greedy) for text in texts]
        common = len(engine.encode(SYSTEM + "Question"))
        ends = answer_rows(engine, rows)
        assert [ends[number].text for number in range(8)] == alone
        total = sum(len(row.ids) for row in rows)
        shared = engine.stats().shared_prompt_tokens
        assert shared >= 7 * (common - 1)
        # all else was computed, each token once: of every answer the last token is chosen and not run
        run = engine._session.prefilled_tokens + engine._session.decode_steps
        assert run == total - shared + sum(end.new_tokens - 1 for end in ends.values())


def test_cancel_ends_all_rows_in_flight(checkpoints: Callable[[str], Path], packs: Path) -> None:
    with open_tiny(checkpoints("olmoe"), packs, batch_rows=3) as engine:
        long = SamplingSettings(temperature=1, seed=1, max_new_tokens=60, ignore_eos=True)
        passes = 0

        def on_pass(event: RowsPass) -> None:
            nonlocal passes
            passes += 1
            if passes == 4:
                engine.cancel()

        ends = answer_rows(engine, [engine.prepare(f"row {number}", long) for number in range(6)], on_pass)
        assert [end.reason for end in ends.values()] == ["cancelled"] * 3
        done = finish(engine.generate("and on", SamplingSettings(temperature=0, max_new_tokens=3)))[1]
        assert done.reason != "error"


@pytest.mark.parametrize("architecture", ["olmoe", "gpt_oss"])
def test_a_read_error_hits_only_the_rows_that_need_the_record(
    architecture: str, checkpoints: Callable[[str], Path], packs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = prompts(6)
    with open_tiny(checkpoints(architecture), packs, residency=0.2, batch_rows=3) as engine:
        expected = answer_rows(engine, [engine.prepare(*row) for row in rows])
        read, calls = engine._file.read_into, 0

        def failing(key: Any, buffer: memoryview) -> int:
            nonlocal calls
            calls += 1
            if calls in (40, 41):  # one pass, and the first of its rows when they are tried one by one
                raise ExpertFileError("record 3 cannot be read")
            return read(key, buffer)

        monkeypatch.setattr(engine._file, "read_into", failing)
        ends = answer_rows(engine, [engine.prepare(*row) for row in rows])
    assert len(ends) == 6
    good = [number for number, end in ends.items() if end.reason != "error"]
    assert len(good) >= 5
    assert all(ends[number].text == expected[number].text for number in good)
    assert all("record 3" in (ends[number].error or "") for number in ends if number not in good)


def test_an_engine_for_one_row_says_so(checkpoints: Callable[[str], Path], packs: Path) -> None:
    with open_tiny(checkpoints("olmoe"), packs) as engine:
        assert engine.rows_at_once == 1
        with pytest.raises(UsageError, match="--batch-size"):
            engine.generate_rows(lambda room: None)
    with open_tiny(checkpoints("qwen3_next"), packs, batch_rows=8) as engine:
        assert engine.rows_at_once == 1


@pytest.mark.parametrize(
    ("architecture", "kv_cache"),
    [("olmoe", "dynamic"), ("gpt_oss", "dynamic"), ("deepseek_v3", "dynamic"), ("olmoe", "fp8"), ("gpt_oss", "fp8")],
)
def test_rows_share_passes_on_a_device_of_its_own_memory(
    architecture: str, kv_cache: str, checkpoints: Callable[[str], Path], packs: Path
) -> None:
    rows = prompts(6)
    with open_tiny(checkpoints(architecture), packs, residency=0.3, kv_cache=kv_cache) as engine:
        alone = [finish(engine.generate(*row))[1].text for row in rows]
    simulated: dict[str, Any] = {"device": "simulated", "residency": 0.3, "batch_rows": 3, "prefill_chunk": 24}
    simulated["kv_cache"] = kv_cache
    with open_tiny(checkpoints(architecture), packs, **simulated) as engine:
        passes: list[RowsPass] = []
        ends = answer_rows(engine, [engine.prepare(*row) for row in rows], passes.append)
        assert [ends[number].text for number in range(6)] == alone
        assert max(event.running for event in passes) == 3
        stats = engine.stats()
        assert stats.virtual and 0 < stats.seconds.total < 1, "by the device's clock"
        memory = stats.memory
        assert memory.vram_peak_bytes is not None and memory.vram_budget_bytes is not None
        assert memory.vram_peak_bytes <= memory.vram_budget_bytes


def test_memory_that_a_device_refuses_rows_costs_slots_and_no_answer(
    checkpoints: Callable[[str], Path], packs: Path
) -> None:
    rows = prompts(5)
    with open_tiny(checkpoints("gpt_oss"), packs, device="simulated", residency=0.5, batch_rows=3) as engine:
        expected = answer_rows(engine, [engine.prepare(*row) for row in rows])
        before, vram = engine.plan.slots, engine._device.vram  # type: ignore[attr-defined]

        def on_pass(event: RowsPass) -> None:
            if engine.plan.slots == before:
                vram.budget = vram.used + 1000  # somebody else took the rest

        said: list[Notice] = []
        ends = answer_rows(engine, [engine.prepare(*row) for row in rows], on_pass, said.append)
        assert said and all("expert slots were given up" in notice.text for notice in said), "while the rows run"
        assert engine.plan.slots < before
        assert {number: (end.text, end.error) for number, end in ends.items()} == {
            number: (end.text, None) for number, end in expected.items()
        }


def test_memory_bounds_the_rows_in_flight(checkpoints: Callable[[str], Path], packs: Path) -> None:
    with open_tiny(checkpoints("olmoe"), packs, batch_rows=8, row_tokens=32) as engine:
        greedy = SamplingSettings(temperature=0, max_new_tokens=110)  # each may take a quarter of the pool
        passes: list[RowsPass] = []
        ends = answer_rows(engine, [engine.prepare(f"row {n}", greedy) for n in range(6)], passes.append)
        assert len(ends) == 6
        assert max(event.running for event in passes) == 4
        passes.clear()
        short = SamplingSettings(temperature=0, max_new_tokens=8)
        answer_rows(engine, [engine.prepare(f"row {n}", short) for n in range(9)], passes.append)
        assert max(event.running for event in passes) == 8
