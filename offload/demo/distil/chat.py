"""Let the dense model answer the prompts; the conversations become training and held-out text."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from offload.demo.distil.prompts import FOLLOW_UPS, HELD_OUT, PROBES, training_prompts

Conversation = list[dict[str, str]]


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, chats: list[Conversation], new_tokens: int, temperature: float) -> list[str]:
    """Return one answer for each conversation; `temperature` 0 means greedy. All are decoded as one padded batch."""
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    # top_k and not top_p: sorting 49,152 logits for each row takes longer than the model itself
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 40} if temperature else {"do_sample": False}
    out = model.generate(**batch, max_new_tokens=new_tokens, **sampling)
    return [
        text.strip() for text in tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    ]


def _extend(model: Any, tokenizer: Any, chats: list[Conversation], new_tokens: int, temperature: float) -> None:
    for chat, text in zip(chats, answer(model, tokenizer, chats, new_tokens, temperature), strict=True):
        chat.append({"role": "assistant", "content": text})


def generate(
    model: Any, tokenizer: Any, path: Path, limit: int = 480, batch: int = 96, new_tokens: int = 120, seed: int = 0
) -> None:
    """Write conversations to the JSON-lines file `path`: `{"split": "train"|"held_out", "messages": [...]}`.

    The first `limit` training prompts are answered with cool sampling, and a third of them get a follow-up question;
    the held-out prompts and the probes are answered greedily.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rounds = [("held_out", [*HELD_OUT, *PROBES], 0.0, 0.0), ("train", training_prompts(seed)[:limit], 0.3, 0.35)]
    started = time.monotonic()
    with path.open("w", encoding="utf-8") as sink:
        for split, asked, temperature, follow_share in rounds:
            for first in range(0, len(asked), batch):
                chats: list[Conversation] = [[{"role": "user", "content": p}] for p in asked[first : first + batch]]
                _extend(model, tokenizer, chats, new_tokens, temperature)
                again = [chat for chat in chats if rng.random() < follow_share]
                for chat in again:
                    chat.append({"role": "user", "content": rng.choice(FOLLOW_UPS)})
                if again:
                    _extend(model, tokenizer, again, new_tokens, temperature)
                for chat in chats:
                    sink.write(json.dumps({"split": split, "messages": chat}, ensure_ascii=False) + "\n")
                sink.flush()
                seconds = time.monotonic() - started
                print(f"{split} T={temperature} {first + batch}/{len(asked)} {seconds:.0f} s", flush=True)
