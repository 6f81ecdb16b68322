"""Getting the grouped kernels, if this card and this installation can run them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from offload.checkpoint.formats import WeightFormat
from offload.compute.grouped.launches import ROW_TILES, combination, cut, first_address, place, product
from offload.compute.grouped.running import GroupedKernels
from offload.compute.matrix import QuantizedMatrix, decode

_TOLERANCE = 0.03
"""Of the largest value: what rounding may do to bfloat16, while a kernel that errs is off by more than one."""


def load_grouped(
    device: torch.device, weight_format: WeightFormat, dtype: torch.dtype, failed: Callable[[str], None]
) -> GroupedKernels | None:
    """The kernels for experts of ``weight_format`` and states in ``dtype``, compiled and tried on ``device``.

    None after telling ``failed`` why they do not work there.
    """
    try:
        kernels = GroupedKernels(device)
    except ImportError as error:
        failed(f"Triton is missing ({error}); pip install triton")
        return None
    try:
        wrong = largest_error(kernels, weight_format, dtype)
    except Exception as error:  # a compiler, a driver and a C compiler have many ways to fail
        failed(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return None
    if not wrong <= _TOLERANCE:
        failed(f"they err by {wrong:.1%} on this card")
        return None
    return kernels


def largest_error(kernels: GroupedKernels, weight_format: WeightFormat, dtype: torch.dtype) -> float:
    """Of products with random weights and of their sums, against torch; relative to the largest value."""
    outputs, inputs, tokens = 48, 1088, 20  # several steps of every kernel, the last of them not full
    random = torch.Generator().manual_seed(0)
    layout = weight_format.layout({"down_proj": ((outputs, inputs), dtype)})
    record = torch.empty(layout.record_bytes, dtype=torch.uint8)
    weight_format.encode(layout, {"down_proj": torch.randn(outputs, inputs, generator=random).to(dtype)}, record)
    weights = weight_format.views(layout, record.to(kernels.device))
    (placed,), anchor = place(weights, ["down_proj"])
    states = torch.randn(tokens, inputs, generator=random).to(kernels.device, dtype)
    matrix = weights["down_proj"]
    exact = decode(matrix, torch.float32, None) if isinstance(matrix, QuantizedMatrix) else matrix.float()  # type: ignore[union-attr]
    expected = states.float() @ exact.t()
    token_of = kernels.upload(torch.arange(tokens, dtype=torch.int32))
    errors = []
    for size in (None, *ROW_TILES):
        rows = 1 if size is None else tokens
        tiles = kernels.upload(torch.tensor(cut(first_address(weights[anchor]), 0, 0, rows, size)))
        for inner, gathered in ((False, None if size is None else token_of), (True, None)):
            output = torch.full((rows, outputs), torch.nan, dtype=dtype, device=kernels.device)
            kernels.run(product(placed, tiles, states, output, inner=inner, size=size, token_of=gathered))
            errors.append((output.float() - expected[:rows]).abs().max() / expected.abs().max())
    summed = torch.empty(1, outputs, dtype=dtype, device=kernels.device)
    table = kernels.upload(torch.tensor([[[row, row] for row in range(tokens)]], dtype=torch.int32))
    routed = torch.ones(1, tokens, device=kernels.device)
    kernels.run(combination(expected, routed, table, summed, torch.float32, torch.float32))
    errors.append((summed.float() - expected.sum(0)).abs().max() / expected.sum(0).abs().max())
    return float(torch.stack(errors).max())  # not a number if one of them is not
