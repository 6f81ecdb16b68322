"""Compiles launches of the grouped kernels for cards that are not there; prints what came out as JSON.

A program of its own, since Triton cannot interpret and compile in one process:

    python -m tests.compute.compile_grouped quick|all ARCHITECTURE...
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from offload.compute.grouped import kernels
from offload.compute.grouped.launches import ROW_TILES, Launch, Placed, combination, product

# Inputs and outputs of Qwen3-30B-A3B's first product.
ROWS, COLUMNS, TOKENS, TOP_K = 1536, 2048, 512, 8
FORMATS = {"int4-g32": (4, 32), "int4": (4, 64), "int4-g128": (4, 128), "int8": (8, 0), "native": (16, 0)}


def main(which: str, architectures: Sequence[str]) -> None:
    found = []
    for architecture in map(int, architectures):
        for name, launch in launches(which):
            compiled = triton.compile(
                source_of(launch), target=GPUTarget("cuda", architecture, 32), options=dict(launch.options)
            )
            assert compiled.asm["cubin"].startswith(b"\x7fELF")
            ptx = compiled.asm["ptx"]
            found.append(
                {
                    "architecture": architecture,
                    "name": name,
                    "kernel": launch.kernel,
                    "target": re.search(r"\.target (\w+)", ptx)[1],  # type: ignore[index]
                    "shared_bytes": compiled.metadata.shared,
                    "wide_loads": len(re.findall(r"ld\.global\.v4\.b32", ptx)),
                    "tensor_core_products": len(re.findall(r"mma\.sync|wgmma\.mma_async", ptx)),
                }
            )
    json.dump(found, sys.stdout)


def launches(which: str) -> Iterator[tuple[str, Launch]]:
    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def multiplying(name: str, dtype: torch.dtype, size: int | None, bias: bool, inner: bool) -> tuple[str, Launch]:
        bits, group = FORMATS[name]
        placed = Placed(ROWS, COLUMNS, bits, group, 0, 2**20, 2**21 if bias else None, (COLUMNS, 1))
        launch = product(
            placed,
            empty(torch.int64, 64, 5),
            empty(dtype, TOKENS, COLUMNS),
            empty(torch.float32 if inner else dtype, TOKENS * TOP_K, ROWS),
            inner=inner,
            size=size,
            token_of=None if inner or size is None else empty(torch.int32, TOKENS * TOP_K),
        )
        return f"{name} {dtype} {size}", launch

    if which == "quick":
        yield multiplying("int4", torch.bfloat16, None, False, False)
        yield multiplying("int4", torch.bfloat16, ROW_TILES[-1], False, True)
        return
    sizes = (None, *ROW_TILES)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for number, (name, dtype, size) in enumerate(itertools.product(FORMATS, dtypes, sizes)):
        yield multiplying(name, dtype, size, number % 2 == 1, number % 4 > 1)
    for products, sums in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        routed = empty(torch.bfloat16, TOKENS, TOP_K)
        table = empty(torch.int32, TOKENS, TOP_K, 2)
        output = empty(torch.bfloat16, TOKENS, COLUMNS)
        staged = empty(products, TOKENS * TOP_K, COLUMNS)
        yield f"combine {products}", combination(staged, routed, table, output, products, sums)


def source_of(launch: Launch) -> ASTSource:
    """The kernel with the types and the hints that Triton would find out from the arguments."""
    kernel = getattr(kernels, launch.kernel)
    names = {
        torch.float32: "fp32",
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.int32: "i32",
        torch.int64: "i64",
    }
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    hints: dict[tuple[int], list[list[Any]]] = {}
    for number, name in enumerate(kernel.arg_names):
        value = launch.arguments[name]
        if name.isupper() or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[number,] = kernels.dtype(value) if isinstance(value, torch.dtype) else value
            continue
        signature[name] = f"*{names[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            hints[number,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, hints)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
