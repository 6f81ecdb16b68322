"""How fast a chunk of a prompt attends in bfloat16: in the kernel, and by torch's ``scaled_dot_product_attention``.

``python -m tests.compute.measure_attention [--heads 16] [--shared 16] [--width 128] [--tokens 512] [--keys 512 2048]``
prints GFLOP/s of what a causal mask leaves, the best of some rounds in turns, by the processor time of one thread: that
is the same beside other programs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from offload.compute.kernels import load_kernels

ROUNDS = 7


def seconds(run: Callable[[], object]) -> float:
    started = time.thread_time()
    run()
    return time.thread_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("heads", 16), ("shared", 16), ("width", 128), ("tokens", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--keys", type=int, nargs="+", default=[512, 2048])
    given = parser.parse_args()
    torch.set_num_threads(1)
    kernels = load_kernels(print)
    if kernels is None or not kernels.prompts:
        raise SystemExit("this processor does not multiply bfloat16")
    heads, width, tokens = given.heads, given.width, given.tokens
    query = torch.randn(1, tokens, heads, width).bfloat16().transpose(1, 2)
    output = torch.empty(tokens, heads, width, dtype=torch.bfloat16)
    for count in given.keys:
        keys, values = torch.randn(2, 1, given.shared, count, width).bfloat16()
        whole = count == tokens
        seen = None if whole else torch.arange(count)[None] <= torch.arange(count - tokens, count)[:, None]

        def stock(keys: torch.Tensor = keys, values: torch.Tensor = values, seen: torch.Tensor | None = seen) -> object:
            times = heads // given.shared  # as transformers repeats them
            keys, values = (states if times == 1 else states.repeat_interleave(times, 1) for states in (keys, values))
            return torch.nn.functional.scaled_dot_product_attention(query, keys, values, seen, is_causal=seen is None)

        def kernel(keys: torch.Tensor = keys, values: torch.Tensor = values) -> None:
            assert kernels is not None
            kernels.attend_prompt(query[0], keys[0], values[0], width**-0.5, None, output)

        operations = 4 * heads * width * (tokens * (count - tokens) + tokens * (tokens + 1) / 2)
        best = [min(times) for times in zip(*((seconds(stock), seconds(kernel)) for _ in range(ROUNDS)), strict=True)]
        rates = [operations / time / 1e9 for time in best]
        print(f"{count} keys: torch {rates[0]:.0f}, the kernel {rates[1]:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
