"""How many rows run at once: the gain curve, and what a plan makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload.memory.rows import CANDIDATES, GainCurve, RowMemory

OLMOE = GainCurve(layers=16, experts=64, top_k=8, record_bytes=3_538_944, skeleton_bytes=300_000_000)
ALL = 16 * 64


def test_row_memory_is_what_grows_and_what_does_not() -> None:
    assert RowMemory(100, 3).bytes(7) == 121


@pytest.mark.parametrize(("rows", "expected"), [(1, 8), (2, 15), (16, 56.4), (1000, 64)])
def test_distinct_experts_of_random_rows(rows: int, expected: float) -> None:
    assert OLMOE.distinct(rows) == pytest.approx(expected, abs=0.1)


def test_all_experts_of_a_small_layer() -> None:
    assert GainCurve(2, 4, 4, 10, 10).distinct(1) == 4


MEASURED = {1: 15.8, 4: 16.0, 8: 19.2, 16: 24.2}
"""Tokens/s by rows of such a model with 485 slots, where the disk gave 2.5 GB/s (docs/batch.md)."""
AS_MEASURED = replace(OLMOE, skeleton_bytes=250_000_000, disk=2.5e9, memory=27e9)


def test_the_curve_is_near_what_was_measured() -> None:
    for rows, rate in MEASURED.items():
        assert AS_MEASURED.tokens_per_s(rows, 485) == pytest.approx(rate, rel=0.3)
    hits = [AS_MEASURED.hit_rate(rows, 485) for rows in MEASURED]
    assert hits == pytest.approx([0.88, 0.68, 0.60, 0.51], abs=0.08)


def test_a_few_rows_that_gain_nothing_are_not_chosen() -> None:
    """Each has favourites of its own, so four read twice as many bytes a token as one."""
    slots = dict.fromkeys(CANDIDATES, 485)
    assert AS_MEASURED.choose({rows: slots[rows] for rows in (1, 2, 4, 8)}) <= 2
    assert AS_MEASURED.choose({rows: slots[rows] for rows in (1, 2, 4, 8, 16)}) == 16
    assert AS_MEASURED.choose({rows: slots[rows] for rows in CANDIDATES}) == 64


def test_hit_rates_lie_between_those_of_one_row_and_the_residency() -> None:
    for slots in (1, ALL // 4, ALL // 2, ALL):
        rates = [OLMOE.hit_rate(rows, slots) for rows in CANDIDATES]
        assert rates == sorted(rates, reverse=True)
        assert slots / ALL <= rates[-1] <= rates[0] <= 1
    assert GainCurve(2, 4, 4, 10, 10).hit_rate(3, 4) == 0.5, "all experts of a layer, half of them with slots"


def test_many_rows_pay_where_experts_are_read_and_must_share_them() -> None:
    rates = {rows: OLMOE.tokens_per_s(rows, ALL // 2) for rows in CANDIDATES}
    assert rates[16] > 1.2 * rates[1] and rates[64] > 2 * rates[16]
    assert OLMOE.tokens_per_s(1, ALL) >= OLMOE.tokens_per_s(1, ALL // 2) > 3 * OLMOE.tokens_per_s(1, 1)


def test_slots_that_rows_take_weigh_against_them() -> None:
    free = dict.fromkeys(CANDIDATES, ALL // 2)
    most = OLMOE.choose(free)
    assert most >= 16
    assert (
        OLMOE.choose({1: ALL, 2: ALL, 4: ALL, 8: ALL // 3, 16: ALL // 6}) == 4
    )  # all experts fit, but not with 8 rows
    assert OLMOE.choose({1: 10}) == 1
