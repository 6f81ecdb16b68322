"""How fast experts of OLMoE's shape are multiplied, by the number of their tokens: by the kernel for few, by that for
many, and decoded for the library.

``python -m tests.compute.measure_many_tokens [--bits 4] [--tokens 8 16 ...]`` prints GFLOP/s, for each way the best of
some rounds over twelve experts, four in a call, the ways in turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from offload.compute.kernels import Kernels, load_kernels
from offload.compute.kernels.binding import Expert
from offload.compute.matrix import MatrixLayout, QuantizedMatrix
from offload.compute.product import Products
from offload.devices.host_memory import HostMemory

HIDDEN, INNER = 2048, 1024
EXPERTS, TOGETHER, ROUNDS = 12, 4, 7


class Record:
    """An expert's matrices in ``memory``, as in a slot."""

    def __init__(self, layouts: tuple[MatrixLayout, MatrixLayout], memory: torch.Tensor) -> None:
        self.memory = memory
        offsets, matrices, end = [], [], 0
        for layout in layouts:
            parts = []
            for shape, dtype in ((layout.codes_shape, layout.codes_dtype), (layout.params_shape, layout.params_dtype)):
                size = torch.Size(shape).numel() * dtype.itemsize
                parts.append(self.memory[end : end + size].view(dtype).view(shape))
                offsets.append(end)
                end += size
            parts[0].random_(0, 100)
            parts[1].fill_(0.001)
            matrices.append(QuantizedMatrix(layout, *parts))
        self.gate_up, self.down = matrices
        self.expert = Expert(layouts[0].shape, layouts[1].shape, *offsets)


def ways(kernels: Kernels, tokens: int) -> dict[str, Callable[[list[Record]], None]]:
    """What multiplies some records with as many tokens each."""
    states, output = torch.randn(tokens, HIDDEN).bfloat16(), torch.zeros(TOGETHER * tokens, HIDDEN)
    token_of = torch.arange(tokens, dtype=torch.int32).repeat(TOGETHER)
    products = Products(kernels, 0)

    def by_kernel(kernel: Callable[..., None], call: list[Record]) -> None:
        jobs = [(record.memory.data_ptr(), 0, number * tokens, tokens) for number, record in enumerate(call)]
        kernel(call[0].expert, jobs, states, output, token_of)

    def by_library(call: list[Record]) -> None:
        for number, record in enumerate(call):
            gate, up = products.decoded_linear(record.gate_up, states).chunk(2, -1)
            inner = torch.nn.functional.silu(gate) * up
            output[number * tokens :][:tokens] = products.decoded_linear(record.down, inner)

    return {
        "the kernel for few tokens": partial(by_kernel, kernels.silu_experts),
        "the kernel for many": partial(by_kernel, kernels.wide_experts),
        "decoded, then the library's product": by_library,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    given = parser.parse_args()
    kernels = load_kernels(print)
    if kernels is None or not kernels.integer_dot:
        raise SystemExit("this processor has no kernel for many tokens")
    layouts = MatrixLayout.make(2 * INNER, HIDDEN, given.bits), MatrixLayout.make(HIDDEN, INNER, given.bits)
    slots = HostMemory(EXPERTS, sum(layout.bytes for layout in layouts), used=EXPERTS)
    records = [Record(layouts, torch.from_numpy(slots.array(slot))) for slot in range(EXPERTS)]
    calls = [records[first : first + TOGETHER] for first in range(0, EXPERTS, TOGETHER)]
    rates: dict[str, list[float]] = {}
    for tokens in given.tokens:
        best: dict[str, float] = {}
        for _ in range(ROUNDS):
            for name, way in ways(kernels, tokens).items():
                started = time.perf_counter()
                for call in calls:
                    way(call)
                seconds = time.perf_counter() - started
                best[name] = max(best.get(name, 0.0), 2 * tokens * 3 * HIDDEN * INNER * EXPERTS / seconds / 1e9)
        for name, rate in best.items():
            rates.setdefault(name, []).append(rate)
    print("| tokens of the expert | " + " | ".join(map(str, given.tokens)) + " |")
    print("| --- |" + " --- |" * len(given.tokens))
    for name, found in rates.items():
        print(f"| {name} | " + " | ".join(f"{rate:.0f}" for rate in found) + " |")


if __name__ == "__main__":
    main()
