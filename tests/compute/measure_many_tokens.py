"""How fast an expert of OLMoE's shape is multiplied, by the number of its tokens: by the kernel for few, in the way for
many, and decoded for the library.

``python -m tests.compute.measure_many_tokens [--bits 4] [--tokens 8 16 ...]`` prints GFLOP/s, for each way the best of
some rounds over twelve experts, the ways in turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from offload.compute.kernels import load_kernels
from offload.compute.matrix import MatrixLayout, QuantizedMatrix, empty_matrix
from offload.compute.product import Products

HIDDEN, INNER = 2048, 1024
EXPERTS, ROUNDS = 12, 7

Way = Callable[[QuantizedMatrix, torch.Tensor], torch.Tensor]


def matrix(rows: int, columns: int, bits: int) -> QuantizedMatrix:
    made = empty_matrix(MatrixLayout.make(rows, columns, bits))
    made.codes.random_(0, 100)
    made.params.fill_(0.001)
    return made


def seconds(way: Way, experts: list[tuple[QuantizedMatrix, QuantizedMatrix]], states: torch.Tensor) -> float:
    started = time.perf_counter()
    for gate_up, down in experts:
        way(down, way(gate_up, states)[:, :INNER].contiguous())
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    given = parser.parse_args()
    kernels = load_kernels(print)
    few, many = Products(kernels, 1 << 30), Products(kernels, 0)
    ways: dict[str, Way] = {
        "the kernel for few tokens": few.linear,
        "the way for many": many.linear,
        "decoded, then the library's product": many.decoded_linear,
    }
    experts = [(matrix(2 * INNER, HIDDEN, given.bits), matrix(HIDDEN, INNER, given.bits)) for _ in range(EXPERTS)]
    best: dict[str, dict[int, float]] = {name: {} for name in ways}
    for tokens in given.tokens:
        states = torch.randn(tokens, HIDDEN).bfloat16()
        operations = 2 * tokens * 3 * HIDDEN * INNER * EXPERTS
        for _ in range(ROUNDS):
            for name, way in ways.items():
                rate = operations / seconds(way, experts, states) / 1e9
                best[name][tokens] = max(best[name].get(tokens, 0.0), rate)
    print("| tokens of the expert | " + " | ".join(map(str, given.tokens)) + " |")
    print("| --- |" + " --- |" * len(given.tokens))
    for name, rates in best.items():
        print(f"| {name} | " + " | ".join(f"{rates[tokens]:.0f}" for tokens in given.tokens) + " |")


if __name__ == "__main__":
    main()
