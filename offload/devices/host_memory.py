"""Host memory for records: one anonymous mapping, page aligned, whose parts can be given back one by one."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import numpy as np

from offload.config import format_size
from offload.errors import BudgetError

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0)


class HostMemory:
    """Address space for ``slots`` buffers of ``slot_bytes``. The system backs a page when it is first written.

    ``used`` of them are meant to be backed. Raises BudgetError if the system refuses as much.
    """

    def __init__(self, slots: int, slot_bytes: int, what: str = "expert slots", *, used: int) -> None:
        self.slot_bytes = slot_bytes
        self.nbytes = slots * slot_bytes
        # private: shared anonymous memory would be counted as shmem and get no huge pages
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        asked = used * slot_bytes
        try:
            if used and _NORESERVE and used < slots:
                mmap.mmap(-1, asked, flags=flags).close()  # what shall be backed, the system may refuse at once
            asked = self.nbytes
            self._map = mmap.mmap(-1, self.nbytes, flags=flags | (_NORESERVE if used < slots else 0))
        except (OSError, OverflowError, ValueError) as error:
            raise BudgetError(
                f"the system refuses {format_size(asked)} for {what} ({error}); give a smaller --ram"
            ) from error
        with contextlib.suppress(AttributeError, OSError):  # fewer page faults and table walks; not everywhere
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = memoryview(self._map)
        # not torch.frombuffer: it does not keep the mapping from being closed under a live tensor
        self._array: np.ndarray = np.frombuffer(self._map, dtype=np.uint8)

    def buffer(self, slot: int) -> memoryview:
        return self._bytes[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def array(self, slot: int | None = None) -> np.ndarray:
        """One buffer, or all of them, as uint8."""
        return self._array if slot is None else self._array[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def release(self, slots: Sequence[int]) -> None:
        """Give the pages of these buffers back; they read as zeros afterwards."""
        for slot in slots:
            with contextlib.suppress(AttributeError, OSError):
                self._map.madvise(mmap.MADV_DONTNEED, slot * self.slot_bytes, self.slot_bytes)

    def close(self) -> None:
        del self._array
        self._bytes.release()
        with contextlib.suppress(BufferError):  # somebody still looks into it: the map goes with the last of them
            self._map.close()
