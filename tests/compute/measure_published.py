"""How long a matrix of a published format takes with few tokens: multiplied as it is, or decoded and then multiplied.

``python -m tests.compute.measure_published [--rows 2048] [--columns 7168] [--tokens 1 4 8] [--dtype float16]
[--formats GPTQ AWQ]`` prints, for each format,
the medians of both in one run, taken in turns, and their ratio; and of decoding it with torch alone. Each call takes
the next of several matrices, so that none is in the processor's cache.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from offload.checkpoint.formats.awq import AwqLayout
from offload.checkpoint.formats.bitsandbytes import BitsAndBytesLayout
from offload.checkpoint.formats.compressed import CompressedLayout
from offload.checkpoint.formats.fp8 import Fp8Layout
from offload.checkpoint.formats.gguf import GgufLayout
from offload.checkpoint.formats.gptq import GptqLayout
from offload.checkpoint.formats.mxfp4 import Mxfp4Layout
from offload.checkpoint.formats.nvfp4 import Nvfp4Layout
from offload.checkpoint.formats.packed import PackedLayout, PackedMatrix, PackedParameter
from offload.compute import decoded
from offload.compute.decoded import Decoder
from offload.compute.kernels.published import load_published

_BYTES = 128 * 2**20
_ROUNDS = 15


def layouts(rows: int, columns: int) -> dict[str, PackedLayout]:
    found: dict[str, PackedLayout] = {
        "FP8, blocks of 128": Fp8Layout((rows, columns), 128, 128, "float8_e4m3fn", "float32"),
        "MXFP4": Mxfp4Layout((columns, rows), 1),
        "NVFP4": Nvfp4Layout((rows, columns), 0),
        "compressed int4, groups of 32": CompressedLayout((rows, columns), 4, 32, "bfloat16", 0, 0),
        "compressed int4, zero points": CompressedLayout((rows, columns), 4, 32, "bfloat16", 1, 0),
        "GPTQ, groups of 128": GptqLayout((rows, columns), 4, columns // 128, "float16", 1, 0),
        "GPTQ, groups by activation": GptqLayout((rows, columns), 4, columns // 128, "float16", 1, 1),
        "AWQ, groups of 128": AwqLayout((rows, columns), 128, "float16"),
        "nf4": BitsAndBytesLayout((rows, columns), 64, 0),
        "nf4, scales of 8 bits": BitsAndBytesLayout((rows, columns), 64, 256),
    }
    return found | {
        f"GGUF {kind}": GgufLayout((rows, columns), kind) for kind in ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
    }


def matrix_of(layout: PackedLayout, seed: int) -> PackedParameter:
    """Weights of any size: how long they take does not depend on it, but for numbers that are hardly any."""
    random = torch.Generator().manual_seed(seed)
    parts = []
    for part in layout.parts:
        if part.name == "order":
            inputs = part.shape[0]
            parts.append((torch.randperm(inputs, generator=random) // 128).int())
        elif part.dtype in (torch.float32, torch.bfloat16, torch.float16):
            parts.append(torch.full(part.shape, 0.01, dtype=part.dtype))
        else:
            data = torch.randint(48, 80, (part.bytes,), dtype=torch.uint8, generator=random)
            parts.append(data.view(part.dtype).view(part.shape))
    return PackedParameter((PackedMatrix(layout, tuple(parts)),))


def as_it_is(decoder: Decoder, states: torch.Tensor, inputs_first: bool, matrix: PackedParameter) -> torch.Tensor:
    product = decoder.product(matrix, states, inputs_first)
    assert product is not None
    return product


def by_library(decoder: Decoder, states: torch.Tensor, inputs_first: bool, matrix: PackedParameter) -> torch.Tensor:
    weights = decoder.decode(matrix, states.dtype)
    return states @ weights if inputs_first else torch.nn.functional.linear(states, weights)


def median_ms(calls: Sequence[Callable[[PackedParameter], object]], matrices: Sequence[PackedParameter]) -> list[float]:
    """Of each call, in turns; the first round does not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    following = itertools.cycle(matrices)
    for _ in range(_ROUNDS + 1):
        for call, taken in zip(calls, seconds, strict=True):
            matrix = next(following)
            start = time.perf_counter()
            call(matrix)
            taken.append(time.perf_counter() - start)
    return [1000 * statistics.median(taken[1:]) for taken in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=7168)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--formats", nargs="+", default=[""], help="those whose name begins so")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    decoded.FEW_TOKENS = max(options.tokens)
    compiled, alone = Decoder(load_published(lambda why: parser.error(f"there are no kernels: {why}"))), Decoder()
    dtype = getattr(torch, options.dtype)
    print(f"[{options.rows}, {options.columns}], {options.dtype}, {options.threads} threads; milliseconds a matrix")
    for name, layout in layouts(options.rows, options.columns).items():
        if not name.startswith(tuple(options.formats)):
            continue
        matrices = [matrix_of(layout, seed) for seed in range(max(2, _BYTES // layout.bytes))]
        for tokens in options.tokens:
            states = torch.randn(tokens, options.columns).to(dtype)
            ways = ((as_it_is, compiled), (by_library, compiled), (by_library, alone))
            own, library, slow = median_ms(
                [partial(way, decoder, states, isinstance(layout, Mxfp4Layout)) for way, decoder in ways], matrices
            )
            print(
                f"{name:30} {tokens:2} tokens: {own:7.2f} as it is ({layout.bytes / own / 1e6:4.1f} GB/s), "
                f"{library:7.2f} decoded: {library / own:4.1f} x, {slow:7.2f} by torch: {slow / own:5.1f} x",
                flush=True,
            )


if __name__ == "__main__":
    main()
