"""When the disk rests while rows decode: ``python -m tests.model.measure_disk_rest BENCH FLAGS``.

Runs ``bench`` with these flags (a ``--batch-size`` among them) on ``--device cpu``, notes when reads run and what the
engine does, and tells of the last passes in which all rows decode how long each part takes with the disk at work and
at rest.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import Any

import torch

import run_local
from cache.keys import ExpertKey
from offload.generation.row_passes import RowPasses
from offload.generation.rows import PassPart
from offload.memory.lanes import DiskLane, Mover, Ticket
from offload.model.experts import ExpertRuntime
from offload.model.packed import Segment

PASSES = 20
NAMES = {
    "begin": "an event before its first load",
    "slots": "an event while misses wait for slots",
    "loads": "an event once all of its loads have begun",
    "layers": "attention, norms, head",
    "between": "draws and texts",
}


class Watch:
    """What the engine does from when on, and when reads began and ended, with their bytes."""

    def __init__(self) -> None:
        self.parts: list[tuple[float, str]] = []
        self.reads: list[tuple[float, float, int]] = []
        self.waits: list[tuple[float, float]] = []
        self.passes: list[tuple[float, float, int]] = []  # begin, end, rows

    def now(self, part: str) -> None:
        self.parts.append((time.perf_counter(), part))

    def install(self) -> None:
        """Changes the classes of the engine, for this process."""
        watch = self
        make, wait = DiskLane.__init__, Ticket.wait
        one_pass, event, start = RowPasses._pass, ExpertRuntime.run, ExpertRuntime._start_loads

        class Watched:
            def __init__(self, mover: Mover) -> None:
                self.mover = mover

            def read_into(self, key: ExpertKey, buffer: Any) -> int:
                began = time.perf_counter()
                size = self.mover.read_into(key, buffer)
                watch.reads.append((began, time.perf_counter(), size))
                return size

        def made(lane: DiskLane, file: Mover, workers: int, name: str = "disk") -> None:
            make(lane, Watched(file), workers, name)

        def waited(ticket: Ticket) -> tuple[int, float]:
            began = time.perf_counter()
            try:
                return wait(ticket)
            finally:
                watch.waits.append((began, time.perf_counter()))

        def passed(self: RowPasses, segments: list[Segment], parts: list[PassPart]) -> torch.Tensor:
            began = time.perf_counter()
            watch.now("layers")
            logits = one_pass(self, segments, parts)
            watch.now("between")
            rows = len(parts) if all(part.decode for part in parts) else 0
            watch.passes.append((began, time.perf_counter(), rows))
            return logits

        def ran(self: ExpertRuntime, *args: Any) -> torch.Tensor:
            watch.now("begin")
            output = event(self, *args)
            watch.now("layers")
            return output

        def started(self: ExpertRuntime, misses: list[ExpertKey]) -> list[ExpertKey]:
            keys = start(self, misses)
            watch.now("slots" if misses else "loads")
            return keys

        DiskLane.__init__, Ticket.wait = made, waited  # type: ignore[method-assign]
        RowPasses._pass, ExpertRuntime.run = passed, ran  # type: ignore[method-assign]
        ExpertRuntime._start_loads = started  # type: ignore[method-assign]

    def report(self) -> None:
        passes = [one for one in self.passes if one[2] > 1][-PASSES:]
        first, last = passes[0][0], passes[-1][1]
        changes: list[tuple[float, int, int, str]] = [(at, 0, 0, part) for at, part in self.parts]
        for kind, spans in ((0, [(b, e) for b, e, _ in self.reads]), (1, self.waits)):
            for began, ended in spans:
                changes += [(began, 1 - kind, kind, ""), (ended, kind - 1, -kind, "")]
        times: Counter[tuple[str, bool, bool]] = Counter()
        at, reading, waiting, part = first, 0, 0, "layers"
        for moment, read, wait, name in sorted(changes):
            moment = min(max(moment, first), last)
            times[part, reading > 0, waiting > 0] += moment - at  # type: ignore[assignment]
            at, reading, waiting, part = moment, reading + read, waiting + wait, name or part
        total, count = last - first, len(passes)
        busy = sum(seconds for (_, reads, _), seconds in times.items() if reads)
        size = sum(size for began, _, size in self.reads if first < began < last)
        print(f"{passes[-1][2]} rows: {1e3 * total / count:.1f} ms a pass, {size / count / 1e6:.0f} MB; the disk is at "
              f"work {busy / total:.0%} of it, at {size / busy / 1e9:.2f} GB/s")  # fmt: skip
        for name, text in NAMES.items():
            shares = [sum(seconds for key, seconds in times.items() if key[0] == name and key[1] == reads)
                      for reads in (True, False)]  # fmt: skip
            print(f"{text}: at work {shares[0] / total:.1%}, at rest {shares[1] / total:.1%}")
        waits = sum(seconds for key, seconds in times.items() if key[2])
        print(f"the engine waits for reads {waits / total:.1%}")


def main(flags: list[str]) -> int:
    watch = Watch()
    watch.install()
    code = run_local.main(["bench", *flags])
    watch.report()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
