"""What is shown of an answer: whole characters only, all of them, and nothing of a stop string or behind it, however
the text is cut into tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from offload.generation.text import Detokenizer, StopStrings
from tests.tiny_models import BOS_ID, EOS_ID, VOCAB_SIZE, save_tiny_tokenizer

REPLACEMENT = "\ufffd"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Byte-level: most characters beyond ASCII take several tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(Path(folder))
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def spaced_tokenizer() -> Any:
    """As Llama's: a word carries its space in front, bytes have tokens, and the first space is dropped."""
    words = ["<s>", "▁the", "▁expert", "▁", "slot", "▁é", ","]
    vocabulary = [(word, -1.0) for word in [*words, *(f"<0x{byte:02X}>" for byte in range(256))]]
    inner = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def show(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> list[str]:
    """What is shown after each token, and at the end."""
    detokenizer = Detokenizer(tokenizer, prompt)
    pieces = [detokenizer.add(token) for token in ids]
    pieces.append(detokenizer.flush())
    assert detokenizer.flush() == "", "nothing is shown twice"
    return pieces


# --- whole characters -----------------------------------------------------------------------------------------------


@given(st.text(max_size=60), st.text(max_size=20))
@example("🙂", "")
@example("a👩‍👩‍👧‍👦é", "🙂")
@example("cafe\u0301 한국어 العربية", "a")
@example("\ufffd half \ufffd\ufffd", "x")
def test_pieces_add_up_and_no_character_is_cut(tokenizer: Any, answer: str, prompt: str) -> None:
    ids = tokenizer.encode(answer, add_special_tokens=False)
    pieces = show(tokenizer, tokenizer.encode(prompt, add_special_tokens=False), ids)
    assert "".join(pieces) == decode(tokenizer, ids) == answer
    if REPLACEMENT not in answer:
        assert not any(REPLACEMENT in piece for piece in pieces)
        assert pieces[-1] == "", "valid text leaves nothing for the end"


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40), st.lists(st.integers(4, 200), max_size=10))
def test_any_ids_at_all(tokenizer: Any, ids: list[int], prompt: list[int]) -> None:
    """Models also produce what is no text: stray bytes come out as stock decoding shows them."""
    prompt = [*prompt, *tokenizer.encode(".", add_special_tokens=False)]  # a prompt ends with a whole character
    pieces = show(tokenizer, prompt, ids)
    assert "".join(pieces) == decode(tokenizer, [*prompt, *ids])[len(decode(tokenizer, prompt)) :]


def test_emoji_across_tokens(tokenizer: Any) -> None:
    ids = tokenizer.encode("a🙂b", add_special_tokens=False)
    assert len(ids) == 6, "four tokens for one character"
    assert show(tokenizer, [], ids) == ["a", "", "", "", "🙂", "b", ""]


def test_answer_that_ends_inside_a_character(tokenizer: Any) -> None:
    ids = tokenizer.encode("ok 🙂", add_special_tokens=False)[:-1]
    pieces = show(tokenizer, [], ids)
    assert "".join(pieces[:-1]) == "ok "
    assert pieces[-1] == decode(tokenizer, ids)[3:]
    assert set(pieces[-1]) == {REPLACEMENT}


def test_stray_byte_does_not_hold_back_what_follows(tokenizer: Any) -> None:
    start, *_ = tokenizer.encode("🙂", add_special_tokens=False)
    (letter,) = tokenizer.encode("a", add_special_tokens=False)
    assert show(tokenizer, [], [start, letter, letter]) == ["", REPLACEMENT + "a", "a", ""]


@given(st.text(max_size=30), st.integers(0, 30))
def test_special_tokens_are_not_shown(tokenizer: Any, answer: str, place: int) -> None:
    ids = tokenizer.encode(answer, add_special_tokens=False)
    place = min(place, len(ids))
    mixed = [BOS_ID, *ids[:place], EOS_ID, BOS_ID, *ids[place:], EOS_ID]
    assert "".join(show(tokenizer, [BOS_ID], mixed)) == answer, "even inside a character"


# --- leading spaces -------------------------------------------------------------------------------------------------


def test_leading_space_after_a_prompt(spaced_tokenizer: Any) -> None:
    the, expert, space, slot = 1, 2, 3, 4
    assert decode(spaced_tokenizer, [the, expert]) == "the expert"
    assert show(spaced_tokenizer, [the], [expert, slot, space, slot]) == [" expert", "slot", " ", "slot", ""]
    assert show(spaced_tokenizer, [], [the, expert]) == ["the", " expert", ""]
    assert show(spaced_tokenizer, [0], [the, expert]) == ["the", " expert", ""]


@given(st.lists(st.integers(0, 6), max_size=20), st.lists(st.integers(0, 6), max_size=12))
def test_leading_spaces(spaced_tokenizer: Any, ids: list[int], prompt: list[int]) -> None:
    pieces = show(spaced_tokenizer, [*prompt, 4], ids)
    whole = decode(spaced_tokenizer, [*prompt, 4, *ids])
    assert "".join(pieces) == whole[len(decode(spaced_tokenizer, [*prompt, 4])) :]


@given(st.text(alphabet="aé🙂 한", max_size=20))
def test_bytes_as_tokens(spaced_tokenizer: Any, answer: str) -> None:
    ids = [7 + byte for byte in answer.encode()]
    pieces = show(spaced_tokenizer, [4], ids)
    assert "".join(pieces) == answer
    assert not any(REPLACEMENT in piece for piece in pieces)


# --- stop strings ---------------------------------------------------------------------------------------------------


def naive(text: str, stops: Sequence[str]) -> str | None:
    """The shortest beginning of ``text`` that ends in a stop string, without the longest one it ends in."""
    for end in range(len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)]
    return None


def cut(text: str, places: Sequence[int]) -> list[str]:
    """``text`` in parts, some of them empty."""
    borders = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(borders)]


def stopped(stops: Sequence[str], parts: Sequence[str]) -> tuple[str, bool]:
    """What is shown of ``parts`` in all, and whether a stop string was found."""
    finder = StopStrings(stops)
    shown = ""
    whole = naive("".join(parts), stops)
    for part in parts:
        shown += finder.add(part)
        assert whole is None or whole.startswith(shown), "nothing is shown that has to be taken back"
    found = finder.found
    shown += finder.flush()
    assert finder.flush() == ""
    return shown, found


STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)
TEXT = st.text(alphabet="ab", max_size=30)


@given(TEXT, STOPS, st.lists(st.integers(0, 30), max_size=30))
@example("xabcdx", ["abcd", "bc"], [])
@example("xabcdx", ["abcd", "bc"], [1, 2, 3, 4, 5])
@example("aaab", ["aab", "ab"], [2])
def test_stop_strings_against_the_definition(text: str, stops: list[str], places: list[int]) -> None:
    shown, found = stopped(stops, cut(text, places))
    expected = naive(text, stops)
    assert found == (expected is not None)
    assert shown == (text if expected is None else expected)


@pytest.mark.parametrize(
    ("stops", "parts", "shown"),
    [
        (["\n\n"], ["one\n", "\ntwo"], "one"),
        (["STOP"], ["x S", "TO", "P y"], "x "),
        (["STOP"], ["x STO", "RY"], "x STORY"),
        (["aab"], ["a", "a", "a", "b"], "a"),
        (["abcd", "bc"], ["abcd"], "a"),
        (["bc", "abc"], ["xabc"], "x"),
        (["b", "a"], ["xab"], "x"),
        (["<|end|>"], ["done<|e"], "done<|e"),
        (["end"], ["end"], ""),
        (["é🙂"], ["aé", "🙂b"], "a"),
    ],
)
def test_stop_strings(stops: list[str], parts: list[str], shown: str) -> None:
    assert stopped(stops, parts)[0] == shown


def test_only_what_may_be_a_stop_string_is_held_back() -> None:
    finder = StopStrings(["\nUser:", "END"])
    assert [finder.add(part) for part in ("a\n", "U", "x", "EN", "E")] == ["a", "", "\nUx", "", "EN"]
    assert finder.flush() == "E"


def test_nothing_follows_a_stop_string() -> None:
    finder = StopStrings(["."])
    assert finder.add("a.b") == "a"
    assert finder.found
    assert finder.add("c") == ""
    assert finder.flush() == ""


def test_no_stop_strings() -> None:
    finder = StopStrings([])
    assert [finder.add("a"), finder.add(""), finder.add("b")] == ["a", "", "b"]
    assert finder.flush() == ""
    assert not finder.found
