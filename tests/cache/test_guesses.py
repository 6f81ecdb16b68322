"""What guesses are worth: places in a list of guesses, judged by what came of them."""

from __future__ import annotations

from cache.guesses import GuessWorth, guesses_of


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
