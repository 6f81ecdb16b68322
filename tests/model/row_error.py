"""Measures what sharing forward passes changes: logits of rows together against each alone, on a real model.

    python -m tests.model.row_error MODEL [--format int4] [--rows 8] [--tokens 24]

All rows get the same tokens in both runs, those of the greedy answers alone. To compare with: the same prompts alone,
but in two chunks, which is as good an order of rounding as any.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offload.config import EngineSettings
from offload.engine import Engine, open_engine
from offload.model.forward_pass import ForwardPass
from offload.model.kv_cache import new_kv_cache
from offload.model.packed import RowAttention, Segment

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain why the sky is blue to a child.",
    "List three fruits and say what they taste like.",
    "How does a bicycle stay upright?",
    "Give me a recipe for pancakes.",
    "What happened in 1969?",
    "Translate 'good morning' into German.",
)


@dataclass(frozen=True, slots=True)
class RowError:
    """Over ``positions``: ``error`` is the largest difference of one logit, ``gap_error`` the most that the gap of the
    best two changed, ``largest`` the largest logit. ``other_tokens`` came out best elsewhere, at gaps of up to
    ``lost_gap``.
    """

    positions: int
    error: float
    gap_error: float
    largest: float
    other_tokens: int
    lost_gap: float


@torch.inference_mode()
def measure(engine: Engine, prompts: Sequence[list[int]], tokens: int) -> tuple[RowError, RowError]:
    """Every prompt alone, answered greedily by ``tokens`` tokens, against all together over the same tokens; and, to
    compare with, against alone with each prompt in two chunks.
    """
    model, runtime, device = engine._model, engine._runtime, engine._device
    most = max(map(len, prompts)) + tokens

    def alone(prompt: list[int], answer: list[int] | None = None) -> torch.Tensor:
        """Logits [tokens, V]. With ``answer`` these are the tokens, and the prompt comes in two chunks."""
        cache, found = new_kv_cache(model.config, most), []
        steps = [prompt] if answer is None else [prompt[: len(prompt) // 2], prompt[len(prompt) // 2 :]]
        while len(found) < tokens:
            step = steps.pop(0)
            runtime.current = ForwardPass(decode=bool(found))
            with device.running():
                ids = torch.tensor([step], device=device.torch_device)
                logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
            if not steps:
                found.append(logits.to("cpu").float())
                steps.append([int(found[-1].argmax()) if answer is None else answer[len(found) - 1]])
        return torch.stack(found)

    expected = [alone(prompt) for prompt in prompts]
    answers = [logits.argmax(1).tolist() for logits in expected]
    caches = [new_kv_cache(model.config, most) for _ in prompts]
    together: list[torch.Tensor] = []
    attention = RowAttention(model)
    with attention.entered(), device.running():
        for number in range(tokens):
            runtime.current = ForwardPass(decode=number > 0)
            steps = prompts if number == 0 else [[answer[number - 1]] for answer in answers]
            segments = [Segment(cache, list(step)) for cache, step in zip(caches, steps, strict=True)]
            together.append(attention.run(segments, device.torch_device).to("cpu").float())
    parts = torch.cat([alone(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)])
    return compare(torch.cat(expected), torch.stack(together, 1).flatten(0, 1)), compare(torch.cat(expected), parts)


def compare(alone: torch.Tensor, together: torch.Tensor) -> RowError:
    """Both [positions, V]."""
    best = alone.topk(2).indices
    gaps, others = (logits.gather(1, best).diff(dim=1).neg()[:, 0] for logits in (alone, together))
    parted = alone.argmax(1) != together.argmax(1)
    return RowError(
        positions=len(alone),
        error=float((alone - together).abs().max()),
        gap_error=float((gaps - others).abs().max()),
        largest=float(alone.abs().max()),
        other_tokens=int(parted.sum()),
        lost_gap=float(gaps[parted].max()) if parted.any() else 0.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--format", default="native")
    parser.add_argument("--dense-format", default="native")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    given = parser.parse_args()
    settings = EngineSettings(
        model=given.model,
        format=given.format,
        dense_format=given.dense_format,
        context_tokens=512,
        batch_rows=given.rows,
    )
    with open_engine(settings, lambda event: None) as engine:
        texts = [QUESTIONS[number % len(QUESTIONS)] for number in range(given.rows)]
        rows, parts = measure(engine, [engine.encode(text) for text in texts], given.tokens)
    print(f"rows together: {rows}\nprompts in two chunks: {parts}")


if __name__ == "__main__":
    main()
