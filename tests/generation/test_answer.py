"""Reasoning, reply and end of an answer, as each family writes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.config import SamplingSettings
from offload.engine import Engine
from offload.events import Done, Event, RowDone, Token
from offload.generation.answer import AnswerForm, AnswerText
from offload.generation.reasoning import TAGS, Piece, Splitter, TagSplitter
from offload.generation.sampling import Sampler
from offload.model.prompt import PromptEncoder
from tests.chat_models import CHAT_MODELS, ChatModel, save_chat_tokenizer
from tests.engines import open_tiny
from tests.tiny_models import build_tiny

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
PAST = [
    {"role": "user", "content": "before"},
    {"role": "assistant", "content": "past", "reasoning_content": "secret"},
    ASKED[1],
]


@pytest.fixture(scope="module", params=CHAT_MODELS)
def talk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatModel, PromptEncoder]:
    model, folder = CHAT_MODELS[request.param], tmp_path_factory.mktemp("chat")
    save_chat_tokenizer(model, folder)
    return model, PromptEncoder(folder)


def answer(encoder: PromptEncoder, prompt: list[int], text: str, ends: str | None = None) -> AnswerText:
    """``text`` as it comes, and the end token ``ends``."""
    tokenizer = encoder.tokenizer
    found = AnswerText(tokenizer, AnswerForm.of(tokenizer), prompt, ())
    pieces = [found.add(token, False) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    if ends is not None:
        pieces.append(found.add(tokenizer.convert_tokens_to_ids(ends), True))
    pieces.append(found.flush())
    assert "".join(piece.text for piece in pieces) == found.text
    assert "".join(piece.reasoning for piece in pieces) == found.reasoning
    return found


def test_reasoning_and_reply(talk: tuple[ChatModel, PromptEncoder]) -> None:
    model, encoder = talk
    found = answer(encoder, encoder.encode(ASKED), model.answer, model.ends)
    assert (found.reasoning, found.text) == (model.reasoning, model.reply)


def test_an_answer_that_was_cut_off_while_it_thought(talk: tuple[ChatModel, PromptEncoder]) -> None:
    model, encoder = talk
    place = model.answer.find("two.") + 4
    if place >= 4:
        found = answer(encoder, encoder.encode(ASKED), model.answer[:place])
        assert (found.reasoning, found.text) == ("Two and two.", "")


def test_plain_answers_stay_as_they_are(talk: tuple[ChatModel, PromptEncoder]) -> None:
    """To a raw prompt, which opened no message and no reasoning."""
    _, encoder = talk
    text = "\n  a < b, <thin> and </think\n>; <tool_call>{}</tool_call>\n"
    assert answer(encoder, encoder.encode("Once"), text).text == text


def test_the_template_s_end_token_ends_the_answer(talk: tuple[ChatModel, PromptEncoder]) -> None:
    model, encoder = talk
    expected = {model.eos} if model.ends == "<|user|>" else {model.eos, model.ends}  # GLM says it in its config alone
    assert {encoder.tokenizer.convert_ids_to_tokens(token) for token in encoder.end_ids()} == expected


def test_the_template_drops_earlier_reasoning(talk: tuple[ChatModel, PromptEncoder]) -> None:
    model, encoder = talk
    prompt = encoder.tokenizer.decode(encoder.encode(PAST), skip_special_tokens=False)
    assert model.past in prompt and "secret" not in prompt


@pytest.mark.parametrize(
    ("name", "text", "ends"),
    [
        ("Kimi K2 Thinking", "<|tool_call_begin|>functions.now:0<|tool_call_end|>", "<|im_end|>"),
        ("Magistral", '[TOOL_CALLS]now[ARGS]{"at": 1}', "</s>"),
        ("gpt-oss", '<|channel|>commentary to=functions.now <|constrain|>json<|message|>{"at": 1}', "<|call|>"),
    ],
)
def test_calls_of_tools_are_shown_as_they_are(name: str, text: str, ends: str, tmp_path: Path) -> None:
    save_chat_tokenizer(CHAT_MODELS[name], tmp_path)
    encoder = PromptEncoder(tmp_path)
    found = answer(encoder, encoder.encode(ASKED), text, ends)
    assert found.text == text + (ends if ends == "<|call|>" else "")
    assert found.reasoning == ""


@pytest.mark.parametrize(
    ("text", "reasoning", "reply"),
    [
        (
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>final<|message|>4",
            "",
            "I look.\n\n4",
        ),
        ("No channel at all", "", "No channel at all"),
        ("w" * 250, "", "w" * 250),
        ("<|channel|>final", "", ""),
        ("<|channel|>final <|constrain|>json<|message|>{}", "", "{}"),
        ("<|channel|>analysis<|message|>Hm", "Hm", ""),
    ],
)
def test_harmony_s_other_ways(text: str, reasoning: str, reply: str, tmp_path: Path) -> None:
    save_chat_tokenizer(CHAT_MODELS["gpt-oss"], tmp_path)
    encoder = PromptEncoder(tmp_path)
    found = answer(encoder, encoder.encode(ASKED), text)
    assert (found.reasoning, found.text) == (reasoning, reply)


def test_stop_strings_end_the_reply_alone(tmp_path: Path) -> None:
    save_chat_tokenizer(CHAT_MODELS["Qwen3"], tmp_path)
    encoder = PromptEncoder(tmp_path)
    tokenizer = encoder.tokenizer
    found = AnswerText(tokenizer, AnswerForm.of(tokenizer), encoder.encode(ASKED), ("four",))
    for token in tokenizer("<think>so four</think>It is fourteen")["input_ids"]:
        found.add(token, False)
    assert found.stopped
    assert found.flush() == Piece()
    assert (found.reasoning, found.text) == ("so four", "It is ")


# --- tags that are no tokens ----------------------------------------------------------------------------------------


def split(splitter: Splitter, text: str, places: list[int]) -> Piece:
    borders = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    found = Piece()
    for start, end in itertools.pairwise(borders):
        found = found.plus(splitter.add(text[start:end]))
    return found.plus(splitter.flush())


@given(st.text(alphabet="ab <\n", max_size=12), st.text(alphabet="ab <\n", max_size=12), st.lists(st.integers(0, 60)))
def test_however_the_text_is_cut(thought: str, reply: str, places: list[int]) -> None:
    for tags in TAGS:
        text = f"\n{tags.opening}{thought}{tags.closing}{reply}"
        assert split(TagSplitter(), text, places) == (reply.lstrip(), thought.strip())
        assert split(TagSplitter(inside=tags), text.partition(tags.opening)[2], places) == (
            reply.lstrip(),
            thought.strip(),
        )
        assert split(TagSplitter(), f"x{text}", places) == (f"x{text}", "")
        unfinished = f"{tags.opening}{thought}"
        assert split(TagSplitter(), unfinished, places) == ("", thought.strip())


# --- the engine -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("engine")
    build_tiny("gpt_oss", folder / "model", sizes={"vocab_size": 400}, tokenizer=False)
    save_chat_tokenizer(CHAT_MODELS["gpt-oss"], folder / "model")
    with open_tiny(folder / "model", folder / "packs", batch_rows=2, context_tokens=512) as opened:
        yield opened


@pytest.fixture
def scripted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> ChatModel:
    """The model answers as gpt-oss does, whatever its weights say."""
    model, tokenizer = CHAT_MODELS["gpt-oss"], engine._encoder.tokenizer
    ids = tokenizer(model.answer + model.ends)["input_ids"]
    prompt = len(engine._encoder.encode(ASKED))

    def choose(sampler: Any, tokens: list[int], logits: torch.Tensor) -> int:
        return int(ids[len(tokens) - prompt])

    monkeypatch.setattr(Sampler, "__call__", choose)
    return model


def test_events_tell_reasoning_from_the_reply(engine: Engine, scripted: ChatModel) -> None:
    events: list[Event] = list(engine.generate(ASKED, SamplingSettings(max_new_tokens=200)))
    tokens = [event for event in events if isinstance(event, Token)]
    done = events[-1]
    assert isinstance(done, Done)
    assert (done.reason, done.text, done.reasoning) == ("stop", scripted.reply, scripted.reasoning)
    assert "".join(token.text for token in tokens) == scripted.reply
    assert "".join(token.reasoning for token in tokens) == scripted.reasoning


def test_rows_tell_reasoning_from_the_reply(engine: Engine, scripted: ChatModel) -> None:
    rows = [engine.prepare(ASKED, SamplingSettings(max_new_tokens=200)) for _ in range(2)]
    ended = [
        event for event in engine.generate_rows(lambda room: rows.pop() if rows else None) if isinstance(event, RowDone)
    ]
    assert [(row.reason, row.text, row.reasoning) for row in ended] == [
        ("stop", scripted.reply, scripted.reasoning)
    ] * 2
