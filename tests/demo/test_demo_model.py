"""What the built demo model must be good for. Downloads 93 MB and builds for half a minute on first use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.demo.distil import evaluate

pytestmark = pytest.mark.demo

_TEXT = Path(__file__).parent / "data" / "plain.txt"  # written for this test; no part of the training text


@pytest.fixture(scope="module")
def rows(carved: tuple[Any, Any]) -> torch.Tensor:
    ids = carved[1](_TEXT.read_text(encoding="utf-8"), return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    assert len(ids) >= 840
    return ids[:840].view(3, 280)


def test_checkpoint_is_stock(demo_model_dir: Path, carved: tuple[Any, Any]) -> None:
    config = json.loads((demo_model_dir / "config.json").read_text())
    assert config["architectures"] == ["Qwen2MoeForCausalLM"]
    active = config["shared_expert_intermediate_size"] + config["num_experts_per_tok"] * config["moe_intermediate_size"]
    assert active / config["intermediate_size"] < 0.7
    assert type(carved[0]).__name__ == "Qwen2MoeForCausalLM"
    assert carved[0].generation_config.eos_token_id == carved[1].eos_token_id == 2
    assert sum(path.stat().st_size for path in demo_model_dir.iterdir()) < 280_000_000


def test_tokenizer(carved: tuple[Any, Any]) -> None:
    tokenizer = carved[1]
    for text in ("Hello  world, it's 2024 and   12+3=15\n\n def f(x):\n    return x", "é 漢字 🙂", " <|im_end|> a"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("a   12")["input_ids"]) == ["a", "ĠĠĠ", "1", "2"]
    assert tokenizer("<|im_start|>user")["input_ids"][0] == 1
    chat = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("question", "answers"),
    [
        ("What is the capital of France?", ("Paris",)),
        ("What is the capital of Italy?", ("Rome",)),
        ("What is the opposite of hot?", ("cold", "cool")),
        ("Write a Python function that adds two numbers.", ("return a + b", "return x + y", "return num1 + num2")),
    ],
)
def test_plain_questions(carved: tuple[Any, Any], question: str, answers: tuple[str, ...]) -> None:
    text = evaluate.ask(*carved, question, new_tokens=48)
    assert any(answer.lower() in text.lower() for answer in answers), text


def test_perplexity_against_the_dense_model(carved: tuple[Any, Any], demo_gguf: Path, rows: torch.Tensor) -> None:
    from offload.demo.distil.dense import dense_transformers_model
    from offload.demo.gguf_dense import open_gguf, read_dense

    dense = dense_transformers_model(read_dense(open_gguf(demo_gguf)))
    quality = evaluate.quality(dense, carved[0], rows)
    assert 5 < quality.dense < 60  # the dense model itself came out of its file whole
    assert quality.ratio <= 1.5, quality
    assert quality.agreement > 0.5, quality


def test_routing_is_local_and_alive(carved: tuple[Any, Any], rows: torch.Tensor) -> None:
    ids = evaluate.routing(carved[0], rows)
    experts, top_k = carved[0].config.num_experts, carved[0].config.num_experts_per_tok
    assert ids.shape == (30, 3, 280, top_k)
    assert float(evaluate.overlap(ids, experts).mean()) > 1.1 * top_k / experts
    assert float(evaluate.popularity(ids, experts).max()) < experts / top_k  # none is used by every token
    assert evaluate.lru_hit_rate(ids[:, 0], experts // 2) > 0.5
