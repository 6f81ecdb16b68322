"""Predictors: what they say, what they learn and keep, recall and precision at m."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache.predictors import (
    PREDICTORS,
    NextGatePrediction,
    PredictorContext,
    PredictorError,
    make_predictor,
    runtime_predictors,
)
from cache.predictors.evaluate import evaluate
from tests.cache.specs import events_of, random_events

CONTEXT = PredictorContext((2, 5), 6)


def test_after_the_last_layer_comes_the_first() -> None:
    predictor = make_predictor("popularity", CONTEXT)
    assert [predictor.layer_after(layer) for layer in (2, 5)] == [5, 2]


def test_popularity_counts() -> None:
    predictor = make_predictor("popularity", CONTEXT)
    for experts in ([3, 1], [3], [4, 1]):
        predictor.record_event(5, experts, decode=True)
    assert predictor.predict(2, 2) == [1, 3]
    assert predictor.predict(2, 6) == [1, 3, 4], "experts that nobody used are no guess"
    assert predictor.predict(5, 3) == []


def test_previous_token_repeats_by_rank() -> None:
    predictor = make_predictor("previous-token", CONTEXT)
    assert predictor.predict(2, 2) == []
    predictor.record_event(5, [4, 0, 3], decode=True)
    predictor.record_event(2, [1], decode=True)
    assert predictor.predict(2, 2) == [4, 0]


def test_layer_markov_learns_pairs() -> None:
    predictor = make_predictor("layer-markov", CONTEXT)
    for first, second in ((0, 3), (1, 4), (0, 3), (1, 5), (1, 5)):
        predictor.record_event(2, [first], decode=True)
        predictor.record_event(5, [second], decode=True)
    predictor.record_event(2, [0], decode=True)
    assert predictor.predict(2, 1) == [3]
    predictor.record_event(5, [3], decode=True)
    predictor.record_event(2, [1], decode=True)
    assert predictor.predict(2, 2) == [5, 4]
    assert predictor.predict(5, 2) == [], "the last event was another layer's"


def test_layer_markov_learns_from_decoding_alone() -> None:
    predictor = make_predictor("layer-markov", CONTEXT)
    predictor.record_event(2, [0], decode=False)
    predictor.record_event(5, [3], decode=True)
    assert not predictor.state()["pairs"].any()


def test_layer_markov_survives_a_very_long_session() -> None:
    predictor = make_predictor("layer-markov", PredictorContext((0, 1), 2))
    predictor.load_state({"pairs": np.array([[[65_500, 20_000], [0, 0]], [[0, 0], [0, 0]]])})
    for _ in range(100):
        predictor.record_event(0, [0], decode=True)
        predictor.record_event(1, [0], decode=True)
    assert predictor.state()["pairs"][0, 0].tolist() == [65_534 // 2 + 66, 10_000], "halved, and counted on"


def test_next_gate_hands_on() -> None:
    predictor = make_predictor("next-gate", CONTEXT)
    assert isinstance(predictor, NextGatePrediction)
    predictor.hand_in(2, [5, 1, 0])
    assert predictor.predict(2, 2) == [5, 1]
    assert predictor.predict(5, 2) == []


@pytest.mark.parametrize("name", runtime_predictors())
def test_state_is_kept(name: str, tmp_path: Path) -> None:
    events = random_events(90, experts=6)
    one, other = (make_predictor(name, PredictorContext((0, 1, 2), 6)) for _ in range(2))
    for layer, experts in zip(events.layer.tolist(), events.sets(), strict=True):
        one.record_event(layer, experts, decode=True)
    np.savez(tmp_path / "state.npz", **one.state())
    with np.load(tmp_path / "state.npz") as file:
        other.load_state(dict(file))
    for predictor in (one, other):
        predictor.record_event(1, [0, 3], decode=True)
    if one.state():
        assert one.predict(1, 4) == other.predict(1, 4) != []
        for bad in ({}, {key: value[:1] for key, value in one.state().items()}):
            with pytest.raises(PredictorError, match="not of this model"):
                other.load_state(bad)


def test_recall_and_precision() -> None:
    events = events_of([(0, [1, 2]), (1, [3, 4]), (0, [2, 1]), (1, [3, 5]), (0, [1, 2])])
    two, four = evaluate("previous-token", events, 6, (1, 4))
    assert two.layers == (0, 1)
    # foretold: layer 0's second and third event, layer 1's second; before that there was nothing to go by
    assert (two.wanted.tolist(), two.guessed.tolist(), two.right.tolist()) == ([4, 4], [2, 1], [2, 1])
    assert two.precision == 1 and two.recall == 3 / 8
    assert (four.guessed.tolist(), four.right.tolist()) == ([4, 2], [4, 1])
    assert four.recall == 5 / 8
    (best,) = evaluate("oracle", events, 6, (2,))
    assert best.recall == best.precision == 1


def test_training_helps() -> None:
    events, training = random_events(60, experts=8), random_events(600, experts=8)
    (alone,), (trained,) = (evaluate("layer-markov", events, 8, (2,), before) for before in (None, training))
    assert (trained.recall or 0) > (alone.recall or 0)


def test_unknown_and_impossible_predictors() -> None:
    with pytest.raises(PredictorError, match=r"crystal-ball.*layer-markov"):
        make_predictor("crystal-ball", CONTEXT)
    with pytest.raises(PredictorError, match="future"):
        make_predictor("oracle", CONTEXT)
    assert set(PREDICTORS) - set(runtime_predictors()) == {"oracle"}


@pytest.mark.parametrize("recall", [0.5, 0.9])
def test_an_oracle_of_some_recall(recall: float) -> None:
    rng = np.random.default_rng(5)
    events = events_of([(number % 2, rng.choice(32, 4, replace=False).tolist()) for number in range(600)])
    found = evaluate(f"oracle:{recall}", events, 32, [4])[0]
    assert found.recall == pytest.approx(recall, abs=0.05) and found.precision == found.recall
    assert evaluate("oracle:1", events, 32, [4])[0].recall == 1
    for wrong in ("oracle:much", "oracle:0", "oracle:1.5"):
        with pytest.raises(PredictorError, match="recall must be above 0 and at most 1"):
            evaluate(wrong, events, 32, [4])
