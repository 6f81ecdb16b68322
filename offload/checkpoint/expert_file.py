"""Reads records from an expert file: preadv straight into the slot, past the page cache where the system allows."""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from cache.keys import ExpertKey
from offload.checkpoint.manifest import EXPERT_FILE_NAME, RECORD_ALIGNMENT, LayerLayout, Manifest, RecordLayout
from offload.config import format_size
from offload.errors import ExpertFileError
from offload.events import LoadProgress


class ExpertFile:
    """An open expert file. :meth:`read_into` may be called from several threads at once.

    ``direct`` tells whether reads go past the page cache (O_DIRECT). Where the file system has no O_DIRECT, reads are
    buffered and each record's pages are given back at once, so that the page cache does not grow beside the budget.
    """

    def __init__(self, folder: Path, *, direct: bool = True) -> None:
        """Open the pack in ``folder``. Raises ExpertFileError if manifest and file do not fit each other."""
        self.manifest = Manifest.read(folder)
        self.path = folder / EXPERT_FILE_NAME
        self._remedy = f"remove the pack (run-local models --remove {folder.name}) and pack the model again"
        self._layers: dict[int, LayerLayout] = {layer.layer: layer for layer in self.manifest.layers}
        try:
            size = self.path.stat().st_size
            if size != self.manifest.total_bytes:
                raise ExpertFileError(
                    f"{self.path}: the file has {size} bytes instead of {self.manifest.total_bytes} "
                    f"(truncated or overwritten); {self._remedy}"
                )
            self.direct = direct and self._try_direct()
            self._fd = os.open(self.path, os.O_RDONLY | (os.O_DIRECT if self.direct else 0))
        except OSError as error:
            raise ExpertFileError(
                f"{self.path}: cannot be opened ({error.strerror}); check the file, or {self._remedy}"
            ) from error

    def layout(self, layer: int) -> RecordLayout:
        return self.manifest.layouts[self._layers[layer].layout]

    def read_into(self, key: ExpertKey, buffer: memoryview) -> int:
        """Read the record of ``key`` into ``buffer`` (at least a record long, 4 KiB aligned); returns its bytes.

        Raises ExpertFileError with the file, the record and the remedy if the read fails or ends early.
        """
        layer = self._layers.get(key.layer)
        if layer is None or not 0 <= key.expert < layer.experts:
            raise ExpertFileError(f"{self.path}: there is no record of layer {key.layer}, expert {key.expert}")
        size = self.manifest.layouts[layer.layout].record_bytes
        start = layer.offset + key.expert * size
        done = reached = 0
        try:
            while done < size:
                end = done + os.preadv(self._fd, [buffer[done:size]], start + done)
                if end <= reached:
                    raise ExpertFileError(
                        f"{self.path}: the file ends inside the record of layer {key.layer}, expert {key.expert}; "
                        f"{self._remedy}"
                    )
                # O_DIRECT cannot go on in the middle of a block: read its beginning again
                done = end - end % RECORD_ALIGNMENT if self.direct else end
                reached = end
        except OSError as error:
            raise ExpertFileError(
                f"{self.path}: reading the record of layer {key.layer}, expert {key.expert} failed "
                f"({error.strerror}); check the disk, then {self._remedy}"
            ) from error
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, start, size, os.POSIX_FADV_DONTNEED)
        return size

    def verify(self, on_event: Callable[[LoadProgress], None]) -> None:
        """Read every record and compare its checksum. Raises ExpertFileError naming the first that differs."""
        buffer = memoryview(mmap.mmap(-1, self.manifest.slot_bytes))
        number = done = 0
        for layer in self.manifest.layers:
            for expert in range(layer.experts):
                size = self.read_into(ExpertKey(layer.layer, expert), buffer)
                if zlib.crc32(buffer[:size]) != self.manifest.checksums[number]:
                    raise ExpertFileError(
                        f"{self.path}: the record of layer {layer.layer}, expert {expert} is damaged "
                        f"(its checksum differs); {self._remedy}"
                    )
                number += 1
                done += size
                on_event(LoadProgress("verify", done, self.manifest.total_bytes, "bytes"))

    def fallback_notice(self) -> str | None:
        """What to tell the user when reads go through the page cache."""
        if self.direct:
            return None
        return (
            f"{self.path.parent} has no O_DIRECT: records ({format_size(self.manifest.slot_bytes)} each) are read "
            "through the page cache, which is slower"
        )

    def close(self) -> None:
        """Close the file; no read may be running."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> ExpertFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _try_direct(self) -> bool:
        """Some file systems refuse O_DIRECT when opening, others only when reading: try both."""
        if not hasattr(os, "O_DIRECT"):
            return False
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            return False
        try:
            return os.preadv(fd, [mmap.mmap(-1, RECORD_ALIGNMENT)], 0) == RECORD_ALIGNMENT
        except OSError:
            return False
        finally:
            os.close(fd)
