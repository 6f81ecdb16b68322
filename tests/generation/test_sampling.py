"""The next token: greedy where nothing asks for more, the checkpoint's own defaults unless a flag overrides them, the
same token for the same seed, and the same probabilities as transformers' ``generate()``.
"""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, PreTrainedModel

from offload.config import SamplingSettings
from offload.errors import ModelError
from offload.generation.sampling import Sampler
from tests.tiny_models import VOCAB_SIZE, build_tiny, load_reference

PROMPT = [5, 9, 5, 200]
NEUTRAL = GenerationConfig()


def logits_of(seed: int, size: int = VOCAB_SIZE) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def draw(settings: SamplingSettings, defaults: GenerationConfig, times: int = 50, seed: int = 1) -> list[int]:
    """A sequence of tokens after :data:`PROMPT`, each with logits of its own."""
    sampler, tokens = Sampler(settings, defaults), list(PROMPT)
    for step in range(times):
        tokens.append(sampler(tokens, logits_of(seed * 1000 + step)))
    return tokens[len(PROMPT) :]


BEST = [int(logits_of(1000 + step).argmax()) for step in range(50)]


# --- greedy or not --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "defaults", "greedy"),
    [
        ({}, {}, True),
        ({}, {"do_sample": False}, True),
        ({}, {"do_sample": True}, False),
        ({}, {"temperature": 0.6, "top_p": 0.95}, False),
        ({}, {"do_sample": False, "temperature": 0.6}, True),
        ({}, {"do_sample": True, "temperature": 0.0}, True),
        ({"temperature": 0}, {"do_sample": True, "temperature": 0.7}, True),
        ({"temperature": 0.0, "top_p": 0.9}, {}, True),
        ({"temperature": 0.5}, {"do_sample": False}, False),
        ({"top_k": 5}, {}, False),
        ({"top_p": 0.5}, {}, False),
        ({"min_p": 0.1}, {}, False),
        ({"repetition_penalty": 1.2}, {}, True),
        ({"seed": 3}, {}, True),
        ({"top_p": 0.9}, {"do_sample": False, "temperature": 0.0}, True),
    ],
)
def test_when_the_choice_is_greedy(settings: dict[str, Any], defaults: dict[str, Any], greedy: bool) -> None:
    assert Sampler(SamplingSettings(**settings), GenerationConfig(**defaults)).greedy == greedy


def test_greedy_takes_the_best() -> None:
    assert draw(SamplingSettings(), NEUTRAL) == BEST
    assert draw(SamplingSettings(temperature=0), GenerationConfig(do_sample=True, top_k=20)) == BEST


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"top_k": 1, "temperature": 5.0}])
def test_narrowest_choice_equals_greedy(settings: dict[str, Any]) -> None:
    sampler = Sampler(SamplingSettings(**settings), NEUTRAL)
    assert not sampler.greedy
    assert draw(SamplingSettings(**settings), NEUTRAL) == BEST


# --- defaults and flags ---------------------------------------------------------------------------------------------


def test_generation_config_is_honoured_and_overridden() -> None:
    defaults = GenerationConfig(do_sample=True, temperature=3.0, top_k=1)
    assert draw(SamplingSettings(seed=1), defaults) == BEST, "its top_k counts"
    wide = draw(SamplingSettings(seed=1, top_k=0), defaults)
    assert wide != BEST, "a flag overrides it, also with the value that means off"
    assert wide == draw(SamplingSettings(seed=1, temperature=3.0), NEUTRAL), "the rest of it still counts"
    assert draw(SamplingSettings(seed=1, top_k=0, temperature=1.0), defaults) == draw(
        SamplingSettings(seed=1), GenerationConfig(do_sample=True)
    )


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"])
def test_each_field_may_come_from_either_side(name: str) -> None:
    value: Any = {"temperature": 1.7, "top_k": 4, "top_p": 0.4, "min_p": 0.3, "repetition_penalty": 4.0}[name]
    sampled = GenerationConfig(do_sample=True)
    by_flag = draw(SamplingSettings(seed=2, **{name: value}), sampled)
    by_config = draw(SamplingSettings(seed=2), GenerationConfig(do_sample=True, **{name: value}))
    assert by_flag == by_config != draw(SamplingSettings(seed=2), sampled)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -3.0), ("temperature", "hot"), ("top_k", "all"), ("top_p", [0.5]), ("repetition_penalty", -1.0)],
)
def test_senseless_generation_config(name: str, value: Any) -> None:
    defaults = GenerationConfig(do_sample=True)
    setattr(defaults, name, value)  # as from a file that somebody wrote by hand
    with pytest.raises(ModelError, match=r"generation_config.json: .* mend it"):
        Sampler(SamplingSettings(), defaults)


# --- seeds ----------------------------------------------------------------------------------------------------------


def test_seed_repeats_the_answer() -> None:
    def answer(seed: int | None) -> list[int]:
        return draw(SamplingSettings(temperature=2.0, seed=seed), NEUTRAL)

    torch.manual_seed(0)
    first = answer(7)
    torch.rand(3)  # what else uses torch's own random state must not matter
    state = torch.get_rng_state()
    assert answer(7) == first
    assert torch.equal(torch.get_rng_state(), state), "nor is it advanced"
    assert answer(8) != first
    assert answer(None) != answer(None)
    assert answer(0) == answer(0)
    assert answer(2**63 - 1) == answer(2**63 - 1)


def test_drawn_seed_is_told_and_gives_the_same_answer() -> None:
    sampler = Sampler(SamplingSettings(temperature=2.0), NEUTRAL)
    again = Sampler(SamplingSettings(temperature=2.0, seed=sampler.seed), NEUTRAL)
    assert [sampler(PROMPT, logits_of(n)) for n in range(20)] == [again(PROMPT, logits_of(n)) for n in range(20)]


# --- what the settings do -------------------------------------------------------------------------------------------


def test_repetition_penalty_lowers_repeats() -> None:
    level = torch.zeros(VOCAB_SIZE)
    level[:8] = 2.0

    def repeats(penalty: float) -> int:
        sampler = Sampler(SamplingSettings(temperature=1.0, repetition_penalty=penalty, seed=0), NEUTRAL)
        tokens = list(PROMPT)
        for _ in range(60):
            tokens.append(sampler(tokens, level))
        return len(tokens) - len(set(tokens))

    assert repeats(5.0) < repeats(1.5) < repeats(1.0)
    greedy = Sampler(SamplingSettings(repetition_penalty=2.0), NEUTRAL)
    assert greedy([3], torch.tensor([0.0, 1.0, 1.5, 2.0])) == 2, "it works on the greedy choice too"
    assert greedy([3, 2], torch.tensor([-1.0, 1.0, 1.5, 2.0])) == 1


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}])
def test_unlikely_tokens_are_never_drawn(settings: dict[str, Any]) -> None:
    logits = logits_of(3)
    order = logits.argsort(descending=True)
    share = logits.softmax(-1)
    if "top_k" in settings:
        allowed = set(order[:5].tolist())
    elif "top_p" in settings:
        allowed = set(order[: int((share[order].cumsum(0) < 0.6).sum()) + 1].tolist())
    else:
        allowed = set((share >= 0.2 * share.max()).nonzero().flatten().tolist())
    sampler = Sampler(SamplingSettings(seed=0, **settings), NEUTRAL)
    drawn = {sampler(PROMPT, logits) for _ in range(400)}
    assert drawn <= allowed
    assert len(drawn) > 1


def test_logits_are_left_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = logits_of(1).to(dtype)
        before = logits.clone()
        Sampler(SamplingSettings(temperature=0.5, top_k=3, repetition_penalty=2.0), NEUTRAL)(PROMPT, logits)
        assert torch.equal(logits, before)


# --- as generate() does ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return load_reference(build_tiny("mixtral", tmp_path_factory.mktemp("model") / "mixtral"))


SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 0.7, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 7, 50, 10_000]),
        "top_p": st.sampled_from([0.1, 0.5, 0.95, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5]),
        "repetition_penalty": st.sampled_from([0.8, 1.0, 1.3]),
    }
)


@given(SETTINGS, st.integers(0, 1000))
def test_scores_equal_those_of_generate(model: PreTrainedModel, values: dict[str, Any], seed: int) -> None:
    """On the same logits: the same tokens are left, with the same scores, so the same draw."""
    config = GenerationConfig(do_sample=True, **values)
    stock = model._get_logits_processor(config, input_ids_seq_length=len(PROMPT), device="cpu")
    logits = logits_of(seed)
    expected = stock(torch.tensor([PROMPT]), logits.clone()[None])
    random = torch.Generator().manual_seed(seed)
    draws = [int(torch.multinomial(expected.softmax(-1), 1, generator=random)) for _ in range(5)]
    for settings, defaults in (
        (SamplingSettings(seed=seed, **values), NEUTRAL),
        (SamplingSettings(seed=seed), config),
    ):
        sampler = Sampler(settings, defaults)
        assert torch.equal(sampler._processors(torch.tensor([PROMPT]), logits.clone()[None]), expected)
        assert [sampler(PROMPT, logits) for _ in range(2)] == draws[:2]
        for drawn in draws[2:]:  # prepared on another thread, and once more
            other = Thread(target=sampler.prepare)
            other.start()
            other.join()
            sampler.prepare()
            assert sampler(PROMPT, logits) == drawn


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_choose_nothing(value: float) -> None:
    logits = logits_of(1)
    logits[3] = value
    with pytest.raises(RuntimeError, match="no token can be chosen"):
        Sampler(SamplingSettings(temperature=1.0), NEUTRAL)(PROMPT, logits)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_answer_equals_generate(model: PreTrainedModel, penalty: float) -> None:
    new = 24
    expected = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=new, min_new_tokens=new, do_sample=False, repetition_penalty=penalty
    )[0].tolist()
    # min_new_tokens forbids the end token, which this does by hand
    sampler, tokens = Sampler(SamplingSettings(repetition_penalty=penalty), NEUTRAL), list(PROMPT)
    with torch.inference_mode():
        for _ in range(new):
            logits = model(torch.tensor([tokens])).logits[0, -1]
            logits[model.generation_config.eos_token_id] = -torch.inf
            tokens.append(sampler(tokens, logits))
    assert tokens == expected


def test_checkpoints_generation_config_survives_the_file(tmp_path: Path) -> None:
    """As stock checkpoints carry it: read from JSON, with fields that are not there."""
    GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, top_k=20).save_pretrained(tmp_path)
    read = GenerationConfig.from_pretrained(tmp_path)
    flags = SamplingSettings(seed=5, temperature=0.6, top_p=0.95, top_k=20)
    assert draw(SamplingSettings(seed=5), read) == draw(flags, NEUTRAL)
