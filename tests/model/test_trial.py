"""The trial of prefetching: finds what is faster, costs next to nothing where nothing is, and sees when it changes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from offload.model.prefetch.trial import BASE, FEWEST_PAIRS, LONGEST_REST, WARM_UP, WINDOW, Trial

Seconds = Callable[[str, int], float]
"""Of a token, by what it is run with and its number."""


def noisy(slower: dict[str, float], noise: float, seed: int = 0) -> Seconds:
    """A hundredth of a second, times ``slower``; a drift and what differs from token to token are the same for all."""
    draw = random.Random(seed)
    levels = [1.0]
    for _ in range(20_000):
        levels.append(min(1.5, max(0.7, levels[-1] + draw.gauss(0, noise / 10))))
    tokens = [max(0.2, draw.gauss(1, noise)) for _ in levels]
    return lambda arm, number: 0.01 * levels[number] * tokens[number] * slower.get(arm, 1.0)


def decode(trial: Trial, seconds: Seconds, tokens: int, first: int = 0) -> tuple[float, float]:
    """What ``tokens`` took, and what they would have taken without prefetching."""
    took = base = 0.0
    for number in range(first, first + tokens):
        now = seconds(trial.arm, number)
        took, base = took + now, base + seconds(BASE, number)
        trial.record(now)
    return took, base


def test_what_is_faster_is_used_after_a_few_windows() -> None:
    trial = Trial(["next-gate"])
    assert trial.report.describe() == "off"
    decode(trial, noisy({"next-gate": 0.8}, 0.05), WARM_UP + FEWEST_PAIRS * 2 * WINDOW)
    assert trial.choice == trial.arm == "next-gate" and trial.resting
    (gain,) = trial.report.gains
    assert gain.pairs == FEWEST_PAIRS and gain.prefetch == "next-gate"
    assert gain.gain == pytest.approx(0.25, abs=0.06) and gain.error is not None and gain.error < 0.06
    assert gain.tokens_per_s is not None and gain.off_tokens_per_s is not None
    assert gain.tokens_per_s / gain.off_tokens_per_s == pytest.approx(1.25, abs=0.06)
    assert trial.report.choice == "next-gate" and trial.report.rounds == 1 and trial.report.testing is None
    assert trial.report.describe().startswith("next-gate (+2")


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("factor", [1.0, 1.03, 1.15, 2.0, 10.0])
def test_it_is_never_below_98_percent_of_off(factor: float, noise: float) -> None:
    for seed in range(5):
        trial = Trial(["next-gate", "layer-markov"])
        seconds = noisy({"next-gate": factor, "layer-markov": factor * 1.02}, noise, seed)
        took = base = 0.0
        for first in range(0, 12_000, 1000):
            more, without = decode(trial, seconds, 1000, first)
            took, base = took + more, base + without
            if factor < 10 and (noise < 0.3 or first > 1000):  # else a loss is seen late
                assert base / took > 0.98, (seed, first)
        assert base / took > 0.98
        if factor > 1.1 and noise < 0.3:
            assert trial.report.choice == BASE


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_better_of_two_is_used_and_the_gain_is_had(noise: float) -> None:
    trial = Trial(["next-gate", "layer-markov"])
    took, base = decode(trial, noisy({"next-gate": 0.95, "layer-markov": 0.85}, noise), 4000)
    assert trial.report.choice == "layer-markov"
    assert 0.93 / 0.85 < base / took < 1 / 0.85


def test_it_sees_when_it_does_not_pay_any_more_and_when_it_does_again() -> None:
    trial = Trial(["next-gate"])
    decode(trial, noisy({"next-gate": 0.8}, 0.05), 1000)
    assert trial.choice == "next-gate"
    decode(trial, noisy({"next-gate": 1.2}, 0.05), LONGEST_REST + 1000)
    assert trial.choice == BASE and trial.report.rounds > 1
    decode(trial, noisy({"next-gate": 0.8}, 0.05), LONGEST_REST + 1000)
    assert trial.choice == "next-gate"
    trial.restart()
    assert (trial.choice, trial.arm, trial.report.gains, trial.resting) == (BASE, BASE, (), False)
    decode(trial, noisy({"next-gate": 1.2}, 0.05), 1000)
    assert trial.choice == BASE and trial.report.describe() == f"off (next-gate: {percent(trial)} %)"


def percent(trial: Trial) -> str:
    return f"{100 * trial.report.gains[0].gain:+.0f}"


def test_tests_are_a_small_part_of_all_tokens() -> None:
    trial = Trial(["next-gate", "layer-markov"])
    seconds = noisy({"next-gate": 1.01, "layer-markov": 0.99}, 0.3)
    tested = 0
    for number in range(20_000):
        tested += trial.arm != BASE
        trial.record(seconds(trial.arm, number) if not trial.resting else seconds(BASE, number))
    assert tested > 0 and trial.report.rounds >= 3
    assert trial.report.rounds < 20


def test_without_candidates_nothing_is_tried() -> None:
    trial = Trial([])
    decode(trial, noisy({}, 0.1), 2000)
    assert trial.arm == BASE and trial.report.gains == ()
