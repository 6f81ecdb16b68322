"""What guesses are worth: places in a list of guesses, judged by what came of them."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from cache.guesses import GuessWorth, SureGuesses, guesses_of


def test_a_place_whose_guesses_fail_is_left_out_until_they_come_true_again() -> None:
    worth = GuessWorth()
    for number in range(20):
        chosen = worth.choose(3, 1, [4, 5, 6], {4, 6})
        assert chosen == ([4, 5, 6] if number < 2 else [4, 5]), "5 is resident and stays in the list"
        worth.record_event(3, [4, 5], decode=True)
    assert worth.choose(3, 2, [9], {9}) == [9], "nothing is known of two layers ahead"
    for _ in range(20):
        worth.choose(3, 1, [4, 5, 6], {4, 6})
        worth.record_event(3, [6], decode=True)
    assert worth.choose(3, 1, [4, 5, 6], {4, 6}) == [4, 5, 6]


def test_residents_tell_nothing_of_those_that_would_be_copied() -> None:
    worth = GuessWorth()
    for _ in range(20):
        worth.choose(0, 1, [1, 2], ())
        worth.record_event(0, [], decode=True)
    assert worth.choose(0, 1, [1, 2], {1, 2}) == [1, 2]


def test_only_the_events_of_a_token_judge() -> None:
    worth = GuessWorth()
    for _ in range(20):
        worth.choose(0, 1, [1], {1})
        worth.record_event(0, [], decode=False)
    assert worth.choose(0, 1, [1], {1}) == [1]


def test_half_of_the_experts_where_reads_take_what_others_wait_for() -> None:
    assert [guesses_of(8, link) for link in (True, False)] == [8, 4]
    assert guesses_of(1, False) == 1


def learned(rows: int = 4) -> SureGuesses:
    """Guesses for ``rows`` rows, their second choices never right, their first always."""
    sure = SureGuesses()
    for _ in range(200):
        guesses = [[10 + row, 20 + row] for row in range(rows)]
        sure.choose(1, guesses, {*range(10, 10 + rows), *range(20, 20 + rows)}, 8)
        sure.record_event(1, [[10 + row] for row in range(rows)])
    return sure


def test_rows_read_the_surest_ahead_and_nothing_before_it_was_seen() -> None:
    assert SureGuesses().choose(1, [[4], [4], [4]], {4}, 100) == []
    assert learned().choose(1, [[4, 5], [6, 5], [8, 9]], {4, 5, 6}, 8) == [4, 6], "8 and 9 are resident"


def test_many_guesses_for_an_expert_make_it_surer_than_one() -> None:
    sure = SureGuesses()
    for number in range(200):  # alone each errs once in five, at another time
        sure.choose(1, [[row] for row in range(5)], set(range(5)), 8)
        sure.record_event(1, [[9] if number % 5 == row else [row] for row in range(5)])
    assert sure.choose(1, [[7], [7], [7], [7], [3]], {3, 7}, 4) == [7]
    assert sure.choose(1, [[7], [7], [7], [7], [3]], {3}, 4) == []
    assert sure.choose(1, [[7], [7], [7], [7], [3]], {3}, 100) == [3], "one in five is little beside a hundred loads"


def test_rows_that_err_together_are_found_out() -> None:
    """Equal rows: each guess is wrong once in four, and then for all of them."""
    sure, chance, wrong = SureGuesses(), random.Random(1), 0
    for _ in range(400):
        chosen = sure.choose(1, [[4], [4], [4], [4]], {4}, 4)
        fails = chance.random() < 0.25
        sure.record_event(1, [[5] if fails else [4]] * 4)
        wrong += fails * len(chosen)
    assert wrong <= 0.03 * 4 * 400, "independent rows would all be wrong once in 256, and the expert be read each time"


def test_an_event_of_other_rows_judges_nothing() -> None:
    sure = learned()
    for rows in (None, [[1]], []):
        for _ in range(300):
            sure.choose(1, [[4], [5]], {4, 5}, 8)
            sure.record_event(1, rows)
    assert sure.choose(1, [[4], [5]], {4, 5}, 8) == [4, 5]


@given(st.integers(0, 2**32), st.integers(1, 16), st.floats(0.0, 1.0), st.booleans())
@settings(max_examples=30, deadline=None)
def test_little_is_read_for_nothing_whatever_comes(seed: int, rows: int, recall: float, together: bool) -> None:
    """Of any rows, whose guesses may suddenly fail: 5 % of all loads, and what shows only afterwards."""
    chance = random.Random(seed)
    sure, wrong, loads = SureGuesses(), 0, 0
    for number in range(240):
        guesses = [chance.sample(range(32), 4) for _ in range(1 if together else rows)] * (rows if together else 1)
        absent = set(chance.sample(range(32), 16))
        needed = chance.randrange(2, 16)
        chosen = sure.choose(number % 4, guesses, absent, needed)
        assert len(set(chosen)) == len(chosen) and absent.issuperset(chosen)
        right = recall if number % 120 < 60 else recall / 2
        shared = {expert: chance.random() < right for expert in range(32)}
        took = [[e for e in row if (shared[e] if together else chance.random() < right)] for row in guesses]
        sure.record_event(number % 4, took)
        wrong += len(set(chosen).difference(*took))
        loads += needed
    assert wrong <= 0.05 * loads + 12
