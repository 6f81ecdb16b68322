"""What prefetching brings rows that decode together: ``python -m tests.model.measure_row_prefetch BENCH FLAGS``.

Runs ``bench`` with these flags (a ``--batch-size`` and maybe a ``--prefetch`` among them) and switches the prefetch, or
with ``--prefetch off`` what rows read ahead, off and on every four passes. Neighbouring fours are compared, so that
what else the machine does hits both.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from itertools import pairwise
from typing import Any

import torch

import run_local
from offload.generation.row_passes import RowPasses
from offload.generation.rows import PassPart
from offload.model.packed import Segment

WINDOW = 4
"""Passes in a row with the same setting. The first after a change is not counted."""


def main(flags: list[str]) -> int:
    windows: list[tuple[bool, list[tuple[float, int]]]] = []  # whether it prefetched; seconds and bytes of each pass
    real = RowPasses._pass
    passes = 0
    both: tuple[Any, Any] | None = None

    def measured(self: RowPasses, segments: list[Segment], parts: list[PassPart]) -> torch.Tensor:
        nonlocal passes, both
        runtime = self._runtime
        if len(parts) < 2 or not all(part.decode for part in parts):
            return real(self, segments, parts)
        both = both or (runtime.predictor, runtime._row_guesses)
        number, place = divmod(passes, WINDOW)
        passes += 1
        on = number % 4 in (1, 2)  # off, on, on, off: a drift counts for neither
        runtime.predictor, runtime._row_guesses = both if on else (None, None)
        if not place:
            windows.append((on, []))
        began, read = time.perf_counter(), runtime.transfers.decode_bytes
        logits = real(self, segments, parts)
        windows[-1][1].append((time.perf_counter() - began, runtime.transfers.decode_bytes - read))
        return logits

    RowPasses._pass = measured  # type: ignore[method-assign]
    code = run_local.main(["bench", *flags])
    report(windows)
    return code


def report(windows: list[tuple[bool, list[tuple[float, int]]]]) -> None:
    for on in (False, True):
        found = [one for setting, each in windows if setting == on for one in each[1:]]
        seconds, size = statistics.median(one[0] for one in found), statistics.fmean(one[1] for one in found)
        print(f"prefetch {'on' if on else 'off'}: {len(found)} passes, {1e3 * seconds:.1f} ms, {size / 1e6:.1f} MB")
    gains = []
    for (one, first), (other, second) in list(pairwise(windows))[::2]:
        times = {setting: statistics.median(t for t, _ in each[1:]) for setting, each in ((one, first), (other, second))
                 if len(each) == WINDOW}  # fmt: skip
        if len(times) == 2:
            gains.append(math.log(times[False] / times[True]))
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    print(f"gain {math.expm1(statistics.fmean(gains)):+.1%} +- {error:.1%} ({len(gains)} pairs)")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
