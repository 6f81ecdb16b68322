"""The way of the experts into the expert file, as a pipeline: while one is encoded, by all cores, the next is read and
the one before is written.

Two experts are in memory at a time and two records. The two threads end with the pipeline, however it ends; an error
in one of them comes out of the call that waits for it.
"""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from offload.checkpoint.disk import write_all
from offload.checkpoint.formats.packed import PackedMatrix
from offload.checkpoint.reading import Staging
from offload.checkpoint.source import CheckpointSource
from offload.model.transformers_api import ExpertsModule

_ANNOUNCED = 3  # experts that the system reads ahead; with fewer a fast disk has pauses

Tensors = Mapping[str, torch.Tensor | PackedMatrix]


def read_ahead(
    source: CheckpointSource, order: Sequence[tuple[ExpertsModule, int]], published: bool = False
) -> Generator[Tensors, None, None]:
    """The tensors of the experts in ``order``; each is good until the next is asked for. Close it if it is not used up.

    ``published``: packed ones as the checkpoint holds them, else decoded.

    Raises what :meth:`CheckpointSource.read_expert` raises, when the expert's turn comes.
    """
    staging = (Staging(), Staging())

    def read(number: int) -> Tensors:
        if number == 0:
            for module, expert in order[1:_ANNOUNCED]:
                source.announce_expert(module, expert)
        if number + _ANNOUNCED < len(order):
            source.announce_expert(*order[number + _ANNOUNCED])
        memory = staging[number % 2]
        memory.reset()
        if published:
            return source.read_published(*order[number], memory)
        return source.read_expert(*order[number], memory)

    with ThreadPoolExecutor(1, "pack-read") as pool:
        ahead = pool.submit(read, 0) if order else None
        for number in range(1, len(order) + 1):
            assert ahead is not None
            tensors = ahead.result()
            ahead = pool.submit(read, number) if number < len(order) else None
            yield tensors


class RecordWriter:
    """Writes records to ``fd`` and computes their checksums, in a thread of its own. To be used as a context.

    At most two records are on their way. ``on_written`` is called in the order of the records, in the thread that uses
    the writer, with the end of the record in the file and its CRC-32.
    """

    def __init__(self, fd: int, slot_bytes: int, on_written: Callable[[int, int], None]) -> None:
        self._fd = fd
        self._buffers = [torch.zeros(slot_bytes, dtype=torch.uint8) for _ in range(2)]
        self._on_written = on_written
        self._pool = ThreadPoolExecutor(1, "pack-write")
        self._writing: deque[tuple[int, Future[int]]] = deque()
        self._number = 0

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def buffer(self) -> torch.Tensor:
        """Memory for the next record, with what an earlier one left there. Raises OSError if a write has failed."""
        self._wait(at_most=1)
        return self._buffers[self._number % 2]

    def write(self, size: int, offset: int) -> None:
        """Start writing the first ``size`` bytes of the memory that :meth:`buffer` gave."""
        data = memoryview(self._buffers[self._number % 2].numpy())[:size]
        self._writing.append((offset + size, self._pool.submit(self._write, data, offset)))
        self._number += 1

    def finish(self) -> None:
        """Wait until everything is written, and zero the memory. Raises OSError if a write has failed."""
        self._wait(at_most=0)
        for buffer in self._buffers:
            buffer.zero_()

    def _wait(self, at_most: int) -> None:
        while self._writing and (len(self._writing) > at_most or self._writing[0][1].done()):
            end, future = self._writing.popleft()
            self._on_written(end, future.result())

    def _write(self, data: memoryview, offset: int) -> int:
        write_all(self._fd, data, offset)
        if hasattr(os, "posix_fadvise"):  # starts the way to the disk, so that the sync of the layer finds little to do
            os.posix_fadvise(self._fd, offset, len(data), os.POSIX_FADV_DONTNEED)
        return zlib.crc32(data)
