"""Routing traces: which experts every token chose, in the form that replay and tuning read.

An ``.npz`` of equally long arrays in execution order, one row per token of each (request, step, layer):
``request int32, phase uint8 (0 prefill, 1 decode), step int32, forward int32, layer int16, ids int16[N, k],
weights float16[N, k]``, and ``meta``, a JSON string with at least ``model, layers, experts, top_k``. Rows with the same
``forward`` and ``layer`` ran together and form one event. An id equal to ``experts`` means "no expert".
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cache.trace_checks import COLUMNS, TraceError, checked_columns, checked_meta

PREFILL, DECODE = 0, 1
META_BYTES_LIMIT = 1 << 20

__all__ = ["DECODE", "PREFILL", "Trace", "TraceError", "TraceRecorder", "load_trace", "save_trace"]


@dataclass(frozen=True, slots=True)
class Trace:
    """A loaded trace. All arrays have N rows; ``ids`` and ``weights`` are [N, top_k]. Nobody changes them."""

    request: NDArray[np.int32]
    phase: NDArray[np.uint8]
    step: NDArray[np.int32]
    forward: NDArray[np.int32]
    layer: NDArray[np.int16]
    ids: NDArray[np.int16]
    weights: NDArray[np.float16]
    meta: dict[str, Any]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return int(self.meta["experts"])

    @property
    def top_k(self) -> int:
        return int(self.meta["top_k"])

    def rows(self, chosen: NDArray[Any]) -> Trace:
        """The trace of some rows: a mask or row numbers in ascending order."""
        columns = {name: getattr(self, name)[chosen] for name in (*COLUMNS, "ids", "weights")}
        return Trace(**columns, meta=dict(self.meta))


class TraceRecorder:
    """Collects routing as it happens. :meth:`record` keeps references; every so often they are written to a spool.

    Memory does not grow with the session: at most :data:`SPOOL_ROWS` rows and one event are held, about 2 MB in
    decoding; the rest lies in an unnamed temporary file in ``folder`` (the system's temporary folder
    if None), which is gone when the process ends, however it ends.
    """

    SPOOL_ROWS = 1 << 12

    def __init__(self, model: str, layers: int, experts: int, top_k: int, folder: Path | None = None) -> None:
        self._meta: dict[str, Any] = {"model": model, "layers": layers, "experts": experts, "top_k": max(1, top_k)}
        self._events: list[tuple[Any, ...]] = []
        self._held = 0
        self._spool = Spool(folder)

    def add_meta(self, **values: Any) -> None:
        """Further facts for ``meta``; JSON values."""
        self._meta.update(values)

    def record(
        self,
        *,
        request: int | NDArray[Any],
        phase: int | NDArray[Any],
        step: int | NDArray[Any],
        forward: int,
        layer: int,
        ids: NDArray[Any],
        weights: NDArray[Any],
    ) -> None:
        """One event: ``ids`` and ``weights`` are [T, k] for the T tokens of this forward pass.

        ``request``, ``phase`` and ``step`` are arrays [T] where the pass holds tokens of several requests. As plain
        numbers they are those of one request, whose tokens come oldest first: ``step`` is then the position of the
        first, and the others are numbered on from there. Arrays must not be changed afterwards. Raises nothing: a full
        disk is reported by :meth:`save`.
        """
        self._events.append((request, phase, step, forward, layer, ids, weights))
        self._held += len(ids)
        if self._held >= self.SPOOL_ROWS:
            self._flush()

    def __len__(self) -> int:
        """The rows so far, one for each token of each event."""
        return self._spool.length + self._held

    def save(self, path: Path) -> None:
        """Write the trace, atomically. Raises OSError, leaving no partial file behind. May be called again."""
        self._flush()
        with _replacing(path) as file:
            _write(file, self._meta, self._spool.length, self._spool.column)

    def trace(self) -> Trace:
        """What was recorded so far, in memory; recording goes on. Raises OSError if the spool cannot be read."""
        self._flush()
        types = COLUMNS | {"ids": np.int16, "weights": np.float16}
        columns: dict[str, Any] = {}
        for name, dtype in types.items():
            column = np.frombuffer(b"".join(self._spool.column(name)), dtype)
            columns[name] = column.reshape(len(self), -1) if name in ("ids", "weights") else column
        return Trace(**columns, meta=dict(self._meta))

    def _flush(self) -> None:
        if not self._events:
            return
        counts = np.array([len(event[5]) for event in self._events])
        ids = np.concatenate([event[5] for event in self._events])
        top_k = self._meta["top_k"] = ids.shape[1]  # what the router does, whatever the checkpoint's config calls it
        row = [*COLUMNS.items(), ("ids", np.int16, (top_k,)), ("weights", np.float16, (top_k,))]
        rows = np.empty(self._held, np.dtype(row))
        for place, name in enumerate(("request", "phase", "step", "forward", "layer")):
            rows[name] = self._column(place, counts)
        # routers of some families choose among more than the experts; those have no weights to load
        none = self._meta["experts"]
        rows["ids"] = np.where((ids < 0) | (ids > none), none, ids)
        rows["weights"] = np.concatenate([event[6] for event in self._events])
        self._events.clear()
        self._held = 0
        self._spool.append(rows)

    def _column(self, place: int, counts: NDArray[Any]) -> NDArray[Any]:
        """One value a row, of a field that is a number or an array in each event. Plain steps are counted on."""
        values = [event[place] for event in self._events]
        arrays = np.array([isinstance(value, np.ndarray) for value in values])
        if arrays.any():
            column = np.concatenate([np.broadcast_to(value, n) for value, n in zip(values, counts, strict=True)])
        else:
            column = np.repeat(np.array(values), counts)
        if place == 2:
            within = np.arange(len(column)) - np.repeat(np.cumsum(counts) - counts, counts)
            column = column + np.where(np.repeat(arrays, counts), 0, within)
        return column


class Spool:
    """Rows in a temporary file, for reading column by column at the end."""

    def __init__(self, folder: Path | None) -> None:
        self._row: np.dtype[Any] | None = None
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._error: OSError | None = None
        self.length = 0

    def append(self, rows: NDArray[Any]) -> None:
        """Keep ``rows``. After an OSError nothing more is kept, and :meth:`column` raises it."""
        if self._error is not None:
            return
        try:
            if self._file is None:
                self._file, self._row = _unnamed_file(self._folder), rows.dtype
            self._file.write(rows.tobytes())
            self.length += len(rows)
        except OSError as error:
            self._error = error

    def column(self, name: str) -> Iterator[bytes]:
        """The contiguous bytes of one column, a block at a time. Raises OSError."""
        if self._error is not None:
            raise self._error
        if self._file is None or self._row is None:
            return
        self._file.seek(0)
        while block := self._file.read(self._row.itemsize << 14):
            yield np.frombuffer(block, self._row)[name].tobytes()
        self._file.seek(0, os.SEEK_END)


def save_trace(path: Path, trace: Trace) -> None:
    """Write ``trace``, atomically. Raises OSError, leaving no partial file behind."""
    with _replacing(path) as file:
        _write(file, trace.meta, len(trace), lambda name: iter([getattr(trace, name).tobytes()]))


def load_trace(path: Path) -> Trace:
    """Read a trace, and believe nothing in it. ``forward`` may be missing: then every (request, step) is a forward
    pass of its own.

    Raises TraceError, one line that names the file, what is wrong and what to do about it.
    """
    data, text = read_arrays(path)
    meta = checked_meta(path, text)
    return Trace(**checked_columns(path, data, meta), meta=meta)


def read_arrays(path: Path) -> tuple[dict[str, NDArray[Any]], str]:
    """The arrays of a file but ``meta``, unchecked, and that. Raises TraceError for a file that is no such archive."""
    if path.is_dir():
        raise TraceError(f"{path} is a folder; name a trace, the file that --trace-out wrote")
    try:
        with open(path, "rb") as file:
            start = file.read(2)
        if start != b"PK":
            raise TraceError(
                f"{path}: not a routing trace (no .npz file); if it is one of another program, turn it into one with "
                "'run-local trace convert'"
            )
        with np.load(path, allow_pickle=False) as archive:
            data = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise TraceError(f"{path}: there is no such file; record a trace with --trace-out FILE") from None
    except TraceError:
        raise
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, MemoryError, OverflowError) as error:
        raise TraceError(f"{path}: the file is damaged or cut off ({error}); record or copy it again") from error
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, SyntaxError) as error:
        raise TraceError(f"{path}: not a routing trace ({' '.join(str(error).split())[:120]})") from error
    if "meta" not in data:
        raise TraceError(f"{path}: not a routing trace (no meta); record one with --trace-out FILE")
    meta = data.pop("meta")
    if meta.dtype.kind != "U" or meta.shape != () or meta.nbytes > META_BYTES_LIMIT:
        raise TraceError(f"{path}: meta is not a JSON text; record the trace again with --trace-out FILE")
    return data, str(meta)


def _write(file: IO[bytes], meta: dict[str, Any], rows: int, column: Callable[[str], Iterator[bytes]]) -> None:
    """The archive that :func:`numpy.load` reads, without ever holding a whole column."""
    top_k = int(meta["top_k"])
    types = COLUMNS | {"ids": np.int16, "weights": np.float16}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        with archive.open("meta.npy", "w") as member:
            np.lib.format.write_array(member, np.array(json.dumps(meta)), allow_pickle=False)
        for name, dtype in types.items():
            shape = (rows, top_k) if name in ("ids", "weights") else (rows,)
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header | {"shape": shape})
                for block in column(name):
                    member.write(block)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of ``path`` when it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _unnamed_file(folder: Path | None) -> IO[bytes]:
    import tempfile

    return tempfile.TemporaryFile(dir=folder, prefix=".run-local-trace-")
