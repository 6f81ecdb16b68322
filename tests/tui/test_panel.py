"""The live figures: the engine's to the last digit, a dash for what was not measured, no row for what is not there."""

from __future__ import annotations

from dataclasses import replace

from offload.events import LiveChanges, PrefetchGain, PrefetchTrial, TierUse, TokenSample
from tests.tui.fake_engine import run_stats
from tests.tui.live_engine import snapshot
from tui.figures import Comparison, Figures, figures
from tui.panel import bar, compact, panel_lines, sparkline


def text(lines: list[list[tuple[str, str]]]) -> str:
    return "\n".join("".join(piece for piece, _ in line).rstrip() for line in lines)


def shown(given: Figures, width: int = 40) -> str:
    return text(panel_lines(given, [], [], None, width))


def test_the_figures_are_the_engines() -> None:
    tokens = [TokenSample(6, 1, 3, 2_000_000, 0.1, 0.025), TokenSample(9, 0, 1, 1_000_000, 0.1, 0.005)]
    page = shown(figures(snapshot(recent=tokens, stats=run_stats(10, 2)), 4096))
    for line in (
        "tokens/s    10.0 now, 12.3 mean",
        "first token 0.25 s",
        "context     120 of 4096",
        "RAM         1.00 GiB of 2.00 GiB",
        "RAM slots   16 of 16 hold experts",
        "hit rate    75.0 % last 2",
        "            70.0 % conversation",
        "pending     5.0 %",
        "misses      20.0 %",
        "disk        1.5 MB a token",
        "compute 85.0 %  disk 15.0 %",
    ):
        assert line in page.splitlines(), page
    for absent in ("VRAM", "link", "on the CPU", "prefetch"):
        assert absent not in page


def test_what_was_not_measured_is_a_dash() -> None:
    stats = run_stats(measured=False)
    stats = replace(stats, experts=replace(stats.experts, hits=0, pending=0, misses=0))
    page = shown(figures(snapshot(recent=(), stats=stats, ttft_s=None), 4096))
    for line in (
        "tokens/s    - now, - mean",
        "first token -",
        "hit rate    - last 64",
        "misses      -",
        "disk        - a token",
    ):
        assert line in page.splitlines(), page
    assert "0.0 %" not in page


def test_rows_of_a_gpu_come_with_it() -> None:
    stats = run_stats(10, 2)
    stats = replace(
        stats,
        memory=replace(stats.memory, vram_budget_bytes=2**33),
        experts=replace(stats.experts, computed_on_cpu=7, prefetched=50, prefetch_used=34),
        prefetch_auto=PrefetchTrial("next-gate", None, 1, (PrefetchGain("next-gate", 6, 0.123, 0.02, 10.0, 11.2),)),
    )
    token = TokenSample(6, 0, 4, 1_000_000, 0.1, 0.01, link_bytes=3_000_000, stall_link=0.02)
    tiers = (TierUse("VRAM", 5, 8, 60), TierUse("RAM", 20, 20, 40))
    page = shown(figures(snapshot(stats=stats, recent=[token], tiers=tiers, vram_bytes=2**32), 4096))
    assert "simulated" not in page
    virtual = snapshot(stats=replace(stats, virtual=True))
    assert "Speed (simulated)" in (page_of := shown(figures(virtual, 4096))) and "Time (simulated)" in page_of
    for line in (
        "VRAM        4.00 GiB of 8.00 GiB",
        "VRAM slots  5 of 8 hold experts",
        "in VRAM     60.0 %",
        "in RAM      40.0 %",
        "on the CPU  7 computed",
        "link        3.0 MB a token",
        "prefetch    34 used, 16 wasted",
        "auto        next-gate (+12 %)",
        "compute 70.0 %  link 20.0 %  disk 10.0 %",
    ):
        assert line in page.splitlines(), page
    unmeasured = shown(figures(snapshot(stats=stats, tiers=tiers, vram_bytes=None), 4096))
    assert "VRAM        - of 8.00 GiB" in unmeasured


def test_the_rates_of_a_conversation_count_from_its_beginning() -> None:
    begun = run_stats(10, 2)
    later = replace(begun, experts=replace(begun.experts, hits=16, pending=1, misses=3))
    assert "90.0 % conversation" in shown(figures(snapshot(stats=later), 4096, begun))
    assert "- conversation" in shown(figures(snapshot(stats=begun), 4096, begun))


def test_before_and_after_a_change() -> None:
    first = TokenSample(5, 0, 5, 0, 0.1, 0.0)
    better = TokenSample(9, 0, 1, 0, 0.05, 0.0)
    before = snapshot(recent=[first] * 3, stats=run_stats(10, 3))
    comparison = Comparison("policy lru → ewma", before)
    after = snapshot(recent=[first, *[better] * 2], stats=run_stats(10, 5), current=LiveChanges(policy="ewma"))
    effect = comparison.effect(after)
    assert (effect.hits_before, effect.hits_after, effect.tokens) == (0.5, 0.9, 2)
    page = text(panel_lines(figures(after, 4096), [], [], effect, 40))
    assert "before      50.0 %, 10.0 tokens/s" in page and "after       90.0 %, 20.0 tokens/s" in page
    nothing_yet = comparison.effect(before)
    assert nothing_yet.speed_after is None and nothing_yet.hits_after is None


def test_one_line_keeps_what_fits() -> None:
    line = compact(figures(snapshot(stats=run_stats(10, 2)), 4096), 200)[0][0]
    assert line == (
        "10.0 tokens/s · hits 60.0 % (70.0 %) · context 120 of 4096 · RAM 1.00 GiB of 2.00 GiB · disk 2.5 MB a token"
    )
    for width in range(20, 120):
        assert len(compact(figures(snapshot(), 4096), width)[0][0]) <= max(width, 14)


def test_curves_and_bars() -> None:
    assert sparkline([0, 1, None, 2], 10) == "▁▅ █"
    assert sparkline([1, 2, 4, 8], 2) == "▅█"
    assert sparkline([None, 0.0], 5) == ""
    assert sparkline([0.5, 1.0], 5, top=1.0) == "▅█"
    assert (bar(0.5, 4), bar(2, 4), bar(-1, 4)) == ("━━──", "━━━━", "────")


def test_no_line_is_wider_than_the_panel() -> None:
    for width in range(24, 60):
        lines = panel_lines(figures(snapshot(), 4096), [1.0] * 99, [0.5] * 99, None, width)
        assert all(len("".join(piece for piece, _ in line)) <= width for line in lines if "compute" not in line[0][0])
