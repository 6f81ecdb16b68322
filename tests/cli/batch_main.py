"""``run-local`` on a real model, hit by a signal while it writes a row of a batch.

``python -m tests.cli.batch_main HOW ROW ARGUMENTS...``: in the middle of writing row number ROW it kills itself (HOW
``kill``), or it interrupts itself once or twice before (``interrupt``, ``interrupt-twice``).
"""

from __future__ import annotations

import os
import signal
import sys

import run_local
from offload.generation.batch_files import BatchOutput


def main() -> int:
    how, at, *arguments = sys.argv[1:]
    write, rows = BatchOutput.write, 0

    def hit(self: BatchOutput, line: bytes) -> None:
        nonlocal rows
        rows += 1
        if rows == int(at):
            if how == "kill":
                self._file.write(line[: len(line) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            for _ in range(2 if how == "interrupt-twice" else 1):
                os.kill(os.getpid(), signal.SIGINT)
        write(self, line)

    BatchOutput.write = hit  # type: ignore[method-assign]
    return run_local.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
