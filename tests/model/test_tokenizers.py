"""Tokenizers of every kind that checkpoints have: read as they are published, or one line that says what is missing."""

from __future__ import annotations

import base64
import importlib.util
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import ModelError, UsageError
from offload.model import tokenizers
from offload.model.prompt import PromptEncoder
from tests.tiny_models import save_tiny_tokenizer

HELLO = [{"role": "user", "content": "hello"}]
BYTES = [bytes([byte]) for byte in range(256)]
WORDS = [b"he", b"ll", b"hell", b"hello", b" w", b"or", b" wor", b"ld", b" world", b" hell", b"ello", "中文".encode()]
RANKS = {token: rank for rank, token in enumerate([*BYTES, *WORDS])}


# --- tiktoken -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    """As in Kimi K2's folder: no tokenizer.json, and a class whose code is in the checkpoint."""
    folder = tmp_path_factory.mktemp("kimi")
    model = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in RANKS.items())
    (folder / "tiktoken.model").write_text(model)
    named = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 22: "<think>", 23: "</think>"}
    added = {
        str(len(RANKS) + number): {"content": text, "special": "think" not in text} for number, text in named.items()
    }
    said = {
        "added_tokens_decoder": added,
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "tokenizer_class": "TikTokenTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(said | {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}})
    )
    template = "{% for m in messages %}<|im_user|>{{ m.content }}<|im_end|>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    return PromptEncoder(folder)


def byte_pairs(text: bytes) -> list[int]:
    """tiktoken's rule: of all neighbours those that make the token of the lowest rank are joined, again and again."""
    if text in RANKS:
        return [RANKS[text]]
    parts = [bytes([byte]) for byte in text]
    while True:
        pairs = [(RANKS.get(parts[at] + parts[at + 1]), at) for at in range(len(parts) - 1)]
        known = [(rank, at) for rank, at in pairs if rank is not None]
        if not known:
            return [RANKS[part] for part in parts]
        _, at = min(known)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@settings(max_examples=50)
@given(st.text(alphabet="helowrd", max_size=12))
def test_kimi_s_byte_pairs(kimi: PromptEncoder, word: str) -> None:
    assert kimi.tokenizer(word, add_special_tokens=False)["input_ids"] == (byte_pairs(word.encode()) if word else [])


def test_kimi_s_special_tokens_and_template(kimi: PromptEncoder) -> None:
    first = len(RANKS)
    assert kimi.encode(HELLO) == [first + 3, RANKS[b"hello"], first + 2]
    assert kimi.end_ids() == {first + 1, first + 2}
    assert kimi.tokenizer.convert_ids_to_tokens(first + 255) == f"<|reserved_token_{first + 255}|>"
    assert kimi.tokenizer.decode([first, RANKS[b"he"], first + 22], skip_special_tokens=True) == "he<think>"
    text = "hello world, é 中文hello 1234 \n\n x's"
    assert kimi.tokenizer.decode(kimi.encode(text)) == text


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("中文English混合", ["中文", "English", "混合"]),
        ("helloWorld's 12345", ["hello", "World's", " ", "123", "45"]),
        ("a  b\n\n c!!", ["a", " ", " b", "\n\n", " c", "!!"]),
    ],
)
def test_kimi_cuts_texts_at(kimi: PromptEncoder, text: str, pieces: list[str]) -> None:
    cut = kimi.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == pieces


# --- sentencepiece --------------------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    head = number & 127
    return bytes([head]) if number < 128 else bytes([head | 128]) + varint(number >> 7)


def field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protocol buffer."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


@pytest.fixture
def sentencepiece(tmp_path: Path) -> Path:
    """A ``tokenizer.model`` as Mixtral has it (BPE, bytes as tokens), and no tokenizer.json."""
    normal, unknown, control, byte = 1, 2, 3, 6
    words = ["he", "ll", "hell", "hello", "▁hello", "▁w", "or", "▁wor", "ld", "▁world"]
    pieces = [("<unk>", 0.0, unknown), ("<s>", 0.0, control), ("</s>", 0.0, control)]
    pieces += [(f"<0x{number:02X}>", 0.0, byte) for number in range(256)]
    pieces += [(word, -float(place), normal) for place, word in enumerate([*words, *"▁helowrd"])]
    model = b"".join(
        field(1, field(1, text.encode()) + field(2, score) + field(3, kind)) for text, score, kind in pieces
    )
    model += field(2, field(3, 2) + field(35, 1) + field(40, 0) + field(41, 1) + field(42, 2))
    model += field(3, field(1, b"identity") + field(3, 1) + field(4, 0) + field(5, 1))
    (tmp_path / "tokenizer.model").write_bytes(model)
    said = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    return tmp_path


def installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


def test_sentencepiece(sentencepiece: Path) -> None:
    if not installed("sentencepiece", "google"):
        pytest.skip("sentencepiece and protobuf are not installed")
    encoder = PromptEncoder(sentencepiece)
    ids = encoder.encode("hello world é")
    assert encoder.tokenizer.convert_ids_to_tokens(ids)[-5:] == ["▁hello", "▁world", "▁", "<0xC3>", "<0xA9>"]
    assert encoder.tokenizer.decode(ids, skip_special_tokens=True) == "hello world é"
    assert encoder.end_ids() == {2}


def test_sentencepiece_names_its_packages(sentencepiece: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if installed("sentencepiece", "google"):
        pytest.skip("sentencepiece is installed")
    monkeypatch.setattr(tokenizers, "_installed", lambda module: False)
    with pytest.raises(
        ModelError, match=r"sentencepiece model and needs packages: pip install sentencepiece protobuf$"
    ):
        PromptEncoder(sentencepiece)


# --- tekken ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tekken(tmp_path: Path) -> Path:
    """Nothing but Mistral's ``tekken.json`` (version 13: with tokens for reasoning)."""
    special = "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]".split()  # noqa: E501
    special += [f"<SPECIAL_{number}>" for number in range(20, 32)] + ["[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"]
    config = {
        "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "num_vocab_tokens": len(RANKS), "default_vocab_size": len(RANKS) + len(special),
        "default_num_special_tokens": len(special), "version": "v13",
    }  # fmt: skip
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode("utf-8", "replace")}
        for token, rank in RANKS.items()
    ]
    named = [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(special)]
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocabulary, "special_tokens": named}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    return tmp_path


def test_tekken(tekken: Path) -> None:
    encoder = PromptEncoder(tekken)
    assert encoder.encode("hello world") == [36 + RANKS[b"hello"], 36 + RANKS[b" world"]]
    assert encoder.tokenizer.decode(encoder.encode("é 中文")) == "é 中文"
    assert encoder.end_ids() == {2}
    if installed("mistral_common", "PIL"):
        assert encoder.encode(HELLO) == [1, 3, 36 + RANKS[b"hello"], 4]
    else:
        with pytest.raises(
            UsageError, match=r"comes from the package mistral-common: pip install mistral-common pillow$"
        ):
            encoder.encode(HELLO)


def test_tekken_with_a_template_needs_nothing(tekken: Path) -> None:
    (tekken / "chat_template.jinja").write_text("<s>{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}")
    assert PromptEncoder(tekken).encode(HELLO) == [1, 3, 36 + RANKS[b"hello"], 4]


# --- others ---------------------------------------------------------------------------------------------------------


def test_code_of_the_checkpoint_is_not_run(tmp_path: Path) -> None:
    said = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own"}))
    (tmp_path / "own.py").write_text("raise SystemExit")
    with pytest.raises(ModelError, match=r"needs code of the checkpoint, which is not run; put a tokenizer\.json"):
        PromptEncoder(tmp_path)


def test_tokenizer_json_alone_is_enough(tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    for name in ("tokenizer.model", "tekken.json"):
        (tmp_path / name).write_text("not looked at")
    assert PromptEncoder(tmp_path).encode("the expert")
