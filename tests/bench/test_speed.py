"""Measured generations: their laps, seeds and figures, on a tiny model and on a scripted engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.bench.figures import TABLE, BenchRun, spread
from offload.bench.request import Workload
from offload.bench.speed import SpeedReport, measure
from offload.config import SamplingSettings
from offload.engine import Engine
from offload.errors import ExpertFileError, RunLocalError, UsageError
from offload.events import Notice
from offload.memory.work import Rates, Work, bound
from tests.bench.fake_engine import FakeBenchEngine, lap
from tests.engines import open_tiny
from tests.tiny_models import build_tiny

WORK = Workload(7, 5, 6)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("tiny")
    with open_tiny(build_tiny("qwen2_moe", folder / "checkpoint"), folder / "packs", residency=0.4) as opened:
        yield opened


def test_a_run_in_three_laps(engine: Engine) -> None:
    report = measure(engine, WORK, SamplingSettings(), 2, lambda notice: None)
    for run in report.runs:
        assert (run.prefill.prompt_tokens, run.prefill.new_tokens) == (7, 1)
        assert (run.warmup.new_tokens, run.warmup.experts.events) == (4, 4 * 4)
        assert (run.measured.new_tokens, run.measured.experts.events) == (6, 6 * 4)
        figures = run.figures()
        assert set(figures) == {figure.name for figure in TABLE}
        parts = [figures[f"{part}_ms_per_token"] or 0.0 for part in ("compute", "stall", "other")]
        assert sum(parts) == pytest.approx(figures["ms_per_token"])
        assert all(part >= 0 for part in parts)
    first, second = report.runs
    assert first.figures()["process_to_first_token_s"] is not None
    assert second.figures()["process_to_first_token_s"] is None, "it says something about a new process alone"
    assert (first.prefill.experts.hit_rate, first.seed, second.seed) == (0.0, 0, 1)


def test_the_same_seed_gives_the_same_work(engine: Engine) -> None:
    reports = [measure(engine, WORK, SamplingSettings(seed=5), 1, lambda notice: None) for _ in range(3)]
    counts = [(r.stats.experts.accesses, r.stats.experts.events) for r in reports]
    assert counts[0] == counts[1] == counts[2]


def test_json_has_the_fields_of_the_statistics_and_the_figures(engine: Engine) -> None:
    report = measure(engine, WORK, SamplingSettings(), 2, lambda notice: None)
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    bench = found.pop("bench")
    assert found == report.stats.to_json()
    assert found["prompt_tokens"] == 7 and found["new_tokens"] == 6
    assert found["ttft_s"] is not None and found["prefill_tokens_per_s"] is not None
    names = {figure.name for figure in TABLE}
    assert set(bench) == {"prompt_tokens", "warmup_tokens", "new_tokens", "repeat", "rows_at_once", "runs", "summary"}
    assert (bench["warmup_tokens"], bench["repeat"]) == (5, 2)
    assert [set(run) for run in bench["runs"]] == [names | {"seed"}] * 2
    assert set(bench["summary"]) == names
    assert set(bench["summary"]["decode_tokens_per_s"]) == {"median", "min", "max"}


def test_a_context_that_is_too_small_is_refused(engine: Engine) -> None:
    measure(engine, Workload(64, 32, 32), SamplingSettings(), 1, lambda notice: None)
    with pytest.raises(UsageError, match="--ctx: 129 tokens of prompt, warm-up and measured part do not fit"):
        measure(engine, Workload(65, 32, 32), SamplingSettings(), 1, lambda notice: None)


def scripted(rates: list[float]) -> tuple[FakeBenchEngine, SpeedReport]:
    fake = FakeBenchEngine(rates=rates)
    return fake, measure(fake, Workload(3, 2, 4), SamplingSettings(seed=9), len(rates), lambda notice: None)


def test_what_the_engine_is_asked_for() -> None:
    fake, _ = scripted([5.0, 6.0])
    assert fake.resets == 2, "every run starts with an empty KV cache"
    assert [s.seed for s in fake.samplings] == [9, 10]
    assert {(s.temperature, s.max_new_tokens, s.ignore_eos, s.stop) for s in fake.samplings} == {(1.0, 6, True, ())}
    assert fake.prompts[0] != fake.prompts[1] and all(set(p) <= set(fake.ordinary_ids()) for p in fake.prompts)
    assert scripted([5.0])[0].prompts[0] == fake.prompts[0]
    given = SamplingSettings(temperature=0.0, top_k=3)
    measure(fake, Workload(3, 2, 4), given, 1, lambda notice: None)
    assert (fake.samplings[-1].temperature, fake.samplings[-1].top_k, fake.samplings[-1].seed) == (0.0, 3, 0)


def test_median_least_and_most() -> None:
    report = scripted([10.0, 30.0, 20.0, 40.0])[1]
    assert report.stats.decode_tokens_per_s == 20.0, "of two in the middle the slower"
    summary = report.to_json()["bench"]["summary"]["decode_tokens_per_s"]
    assert summary == {"median": 25.0, "min": 10.0, "max": 40.0}
    rows = {row[0]: row[1:] for row in report.rows()}
    assert rows["FIGURE"] == ("FIRST", "MEDIAN", "MIN", "MAX")
    assert rows["decode, measured"] == ("10.00 tokens/s", "25.00 tokens/s", "10.00 tokens/s", "40.00 tokens/s")
    assert len({len(row) for row in report.rows()}) == 1
    one = scripted([10.0])[1]
    assert one.rows()[0] == ("FIGURE", "VALUE") and {len(row) for row in one.rows()} == {2}
    assert spread([None, None]) is None


def test_the_time_of_a_token_is_divided() -> None:
    measured = lap(tokens=4, rate=10.0, total=0.6, stall=0.1)  # 0.4 s in forward passes
    figures = BenchRun(0, lap(tokens=1), lap(tokens=1), measured, None).figures()
    assert figures["ms_per_token"] == pytest.approx(150)
    assert figures["stall_ms_per_token"] == pytest.approx(25)
    assert figures["compute_ms_per_token"] == pytest.approx(75)
    assert figures["other_ms_per_token"] == pytest.approx(50)


def test_runs_are_told_as_they_end() -> None:
    notices: list[Notice] = []
    measure(FakeBenchEngine(rates=[5.0, 6.0]), WORK, SamplingSettings(), 2, notices.append)
    assert [notice.text for notice in notices] == ["run 1 of 2: 5.00 tokens/s", "run 2 of 2: 6.00 tokens/s"]


def test_a_generation_that_fails_or_ends_early() -> None:
    with pytest.raises(RunLocalError, match="record 3"):
        measure(FakeBenchEngine(rates=[1.0], error="record 3 is damaged"), WORK, SamplingSettings(), 1, lambda n: None)
    with pytest.raises(RunLocalError, match="ended after 4 of 11 tokens"):
        measure(FakeBenchEngine(rates=[1.0], longest=4), WORK, SamplingSettings(), 1, lambda n: None)


def test_a_read_error_ends_the_bench(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> int:
        raise ExpertFileError("record 3 of layer 2 cannot be read")

    monkeypatch.setattr("offload.checkpoint.expert_file.ExpertFile.read_into", fail)
    with pytest.raises(RunLocalError, match="record 3 of layer 2"):
        measure(engine, WORK, SamplingSettings(seed=77), 1, lambda notice: None)


def test_rows_at_once(tmp_path: Path) -> None:
    folder = build_tiny("olmoe", tmp_path / "checkpoint")
    with open_tiny(folder, tmp_path / "packs", residency=0.4, batch_rows=4, row_tokens=24) as several:
        report = measure(
            several,
            Workload(10, 4, 8),
            SamplingSettings(),
            2,
            lambda notice: None,
            Rates(1e18, 1e18, {0: 1e18, 4: 1e18, 8: 1e18}),
        )
    assert report.to_json()["bench"]["rows_at_once"] == 4
    assert "4 rows at once" in " ".join(report.summary())
    for run in report.runs:
        assert run.prefill.prompt_tokens == 40
        assert (run.measured.new_tokens, run.measured.decode_passes) == (32, 8)
        figures = run.figures()
        # the one slot at the cold end held a record when the pass began: of so few, one a pass weighs much
        assert figures["decode_read_ratio"] is not None and 1 <= figures["decode_read_ratio"] <= 1.15
        assert figures["prefill_read_ratio"] is not None and 1 <= figures["prefill_read_ratio"] <= 1.15
        assert figures["decode_to_bound"] is not None and 0 < figures["decode_to_bound"] < 1
        assert figures["prefill_to_bound"] is not None and figures["prefill_to_bound"] > 1


def test_bounds_are_the_larger_of_reads_and_arithmetic() -> None:
    work, rates = Work(1000, 100, {0: 30.0, 4: 40.0}), Rates(10.0, 1000.0, {0: 100.0, 4: 200.0})
    few = bound(work, rates, needed_bytes=50, passes=2, accesses=30, tokens=2)
    assert (few.disk, few.compute, few.seconds) == (5.0, 5.0, 5.0)
    many = bound(work, rates, needed_bytes=50, passes=1, accesses=10, tokens=40)
    assert (many.compute, many.seconds) == (20.0, 20.0)
