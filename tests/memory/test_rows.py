"""How many rows run at once: the gain curve, and what a plan makes of it."""

from __future__ import annotations

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


def test_rows_pay_where_experts_are_read_and_must_share_them() -> None:
    rates = [OLMOE.tokens_per_s(rows, ALL // 2) for rows in CANDIDATES]
    assert rates == sorted(rates)
    assert rates[4] / rates[0] == pytest.approx(2, abs=0.4)  # 16 random rows share little more than half
    assert OLMOE.tokens_per_s(1, ALL) > 3 * OLMOE.tokens_per_s(1, ALL // 2)


def test_slots_that_rows_take_weigh_against_them() -> None:
    free = dict.fromkeys(CANDIDATES, ALL // 2)
    most = OLMOE.choose(free)
    assert most >= 16
    assert (
        OLMOE.choose({1: ALL, 2: ALL, 4: ALL, 8: ALL // 3, 16: ALL // 6}) == 4
    )  # all experts fit, but not with 8 rows
    assert OLMOE.choose({1: 10}) == 1
