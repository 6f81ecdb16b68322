"""The files of a batch: the input, the output that grows row by row, and the settings that ``--resume`` compares."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import stat
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader, FileIO
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from offload.config import EngineSettings, SamplingSettings
from offload.errors import RunLocalError, UsageError
from offload.generation.batch import id_key

_VERSION = 1
_BLOCK = 1 << 20
_GZIP = b"\x1f\x8b"
_SAMPLED_ROWS = 1000
_BYTES_PER_TOKEN = 3
"""Few, so that room is rather too large: English has 4 to 5 bytes a token, other scripts fewer."""


@dataclass(frozen=True, slots=True)
class BatchInput:
    """The rows to run. ``stream``: standard input or a pipe, which can be read only once."""

    path: Path | None
    stream: bool

    @classmethod
    def open(cls, name: str) -> BatchInput:
        """``-`` is standard input. Raises UsageError if there is nothing to read."""
        if name == "-":
            return cls(None, True)
        path = Path(name)
        try:
            kind = path.stat().st_mode
            if stat.S_ISDIR(kind):
                raise UsageError(f"{name}: is a folder, not a file of rows")
            if stat.S_ISREG(kind):
                open(path, "rb").close()
        except (OSError, ValueError) as error:
            raise UsageError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
        return cls(path, not stat.S_ISREG(kind))

    def lines(self) -> Iterator[bytes]:
        """All lines, ended by line feeds alone; those of a gzip file, whatever its name, as it unpacks."""
        name = "standard input" if self.path is None else str(self.path)
        try:
            with contextlib.ExitStack() as stack:
                reader = cast(
                    BufferedReader,
                    sys.stdin.buffer if self.path is None else stack.enter_context(open(self.path, "rb")),
                )
                if reader.peek(len(_GZIP))[: len(_GZIP)] == _GZIP:
                    yield from gzip.GzipFile(fileobj=reader)
                else:
                    yield from reader
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise RunLocalError(f"{name}: is a damaged gzip file ({error})") from error
        except OSError as error:
            raise RunLocalError(f"{name}: cannot be read ({error.strerror or error})") from error

    def rows(self) -> int | None:
        """Rows in the file; None for a stream."""
        return None if self.stream else sum(1 for line in self.lines() if line.strip())

    def typical_tokens(self, sampling: SamplingSettings) -> int | None:
        """Tokens of prompt and answer that nine of ten of the first rows have at most, by their length; None for a
        stream and for a file without rows.
        """
        if self.stream:
            return None
        found = []
        for line in islice((line for line in self.lines() if line.strip()), _SAMPLED_ROWS):
            answer = sampling.max_new_tokens
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(own := row.get("max_new_tokens"), int):
                    answer = max(1, own)
            found.append(len(line) // _BYTES_PER_TOKEN + answer)
        return sorted(found)[len(found) * 9 // 10] if found else None

    def fingerprint(self, size: int | None = None) -> dict[str, Any] | None:
        """Size in bytes and SHA-256 of the file, or of its first ``size`` bytes; None for a stream."""
        if self.stream or self.path is None:
            return None
        digest, left = hashlib.sha256(), sys.maxsize if size is None else size
        read = 0
        with open(self.path, "rb") as file:
            while block := file.read(min(_BLOCK, left - read)):
                digest.update(block)
                read += len(block)
        return {"bytes": read, "sha256": digest.hexdigest()}


def batch_settings(engine: EngineSettings, sampling: SamplingSettings, base_seed: int) -> dict[str, Any]:
    """What decides the text of a row: a batch that is resumed must have the same."""
    folder = Path(engine.model)
    return {
        "model": str(folder.resolve()) if folder.is_dir() else engine.model,
        "revision": engine.revision,
        "device": engine.device,
        "format": engine.format,
        # only where it is not the default, so that batches begun before the flag was there go on
        **({} if engine.dense_format == "native" else {"dense_format": engine.dense_format}),
        **({} if engine.kv_cache == "dynamic" else {"kv_cache": engine.kv_cache}),
        "ctx": engine.context_tokens,
        "prefill_chunk": engine.prefill_chunk,
        **{name: getattr(sampling, name) for name in SamplingSettings.field_names()},
        "stop": list(sampling.stop),
        "seed": base_seed,
    }


class BatchOutput:
    """An append-only file of whole rows with its settings beside it, ``FILE.settings.json``.

    Opening a new one creates both files; closing it before a row or :meth:`finish` removes them again, so that a run
    that failed to start leaves nothing behind. A last line that a kill tore is cut off.
    """

    def __init__(self, path: Path, file: FileIO, new: bool, done: Counter[str]) -> None:
        self.path = path
        self.done = done
        """Output rows that were there before, counted by the key of their id."""
        self._file = file
        self._remove_unless_used = new

    @classmethod
    def create(cls, path: Path, settings: dict[str, Any], source: BatchInput) -> BatchOutput:
        """Raises UsageError if the file exists or cannot be created."""
        try:
            file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by close()
        except FileExistsError:
            raise UsageError(f"{path}: exists already; add --resume to go on with it, or remove it") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{path}: cannot be created ({reason})") from error
        output = cls(path, file, True, Counter())
        try:
            output._lock()
            _write_settings(settings_path(path), settings | {"input": source.fingerprint()})
        except BaseException:
            output.close()
            raise
        return output

    @classmethod
    def resume(cls, path: Path, settings: dict[str, Any], source: BatchInput) -> BatchOutput:
        """Go on with the file, or create it if there is none yet.

        Raises UsageError if it was made with other settings or from another input, or is no output of a batch.
        """
        if source.stream:
            raise UsageError("--resume needs an input file that can be read again, not a stream")
        if not path.exists():
            return cls.create(path, settings, source)
        _compare(path, _read_settings(path), settings, source)
        try:
            file = open(path, "r+b", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise UsageError(f"{path}: cannot be written ({error.strerror})") from error
        output = cls(path, file, False, Counter())
        try:
            output._lock()
            output._take_stock()
        except BaseException:
            output.close()
            raise
        return output

    def write(self, line: bytes) -> None:
        """Append a row. If it cannot be written whole (a full disk) nothing of it stays. Raises RunLocalError."""
        start = self._file.tell()
        try:
            written = self._file.write(line)
            while written < len(line):  # a disk that runs full takes a part first
                written += self._file.write(line[written:])
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(start)
            raise RunLocalError(
                f"{self.path}: cannot be written ({error.strerror}); the rows before are kept: make room and go on "
                "with --resume"
            ) from error
        self._remove_unless_used = False

    def finish(self) -> None:
        """The batch is complete: keep the files even without a row, and see the rows safe on the disk."""
        self._remove_unless_used = False
        with suppress(OSError):  # a pipe or a device has nothing to sync
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._remove_unless_used:
            settings_path(self.path).unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
            self._remove_unless_used = False
        self._file.close()

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        """Two runs must not append to one file. Where there are no locks there is no check."""
        try:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._remove_unless_used = False
            raise UsageError(f"{self.path}: another run is writing this file") from None
        except (ImportError, OSError):
            return

    def _take_stock(self) -> None:
        whole = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                if line.strip():
                    self.done[_done_key(line, f"{self.path}: line {number}")] += 1
        self._file.truncate(whole)
        self._file.seek(whole)


class StandardOutput:
    """Rows to standard output, flushed one by one."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()

    def write(self, line: bytes) -> None:
        """Raises BrokenPipeError if nobody reads any more, RunLocalError for anything else."""
        try:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise RunLocalError(f"the output cannot be written: {error.strerror}") from error

    def finish(self) -> None:
        pass

    def __enter__(self) -> StandardOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def open_sink(
    path: Path | None, resume: bool, settings: dict[str, Any], source: BatchInput
) -> BatchOutput | StandardOutput:
    """Where the rows go; ``path`` None is standard output. Raises UsageError."""
    if path is None:
        if resume:
            raise UsageError("--resume needs an output file, not standard output")
        return StandardOutput()
    return BatchOutput.resume(path, settings, source) if resume else BatchOutput.create(path, settings, source)


def choose_seed(given: int | None, resumed: Path | None) -> int:
    """``--seed``, or that of the run that is resumed, or a new one."""
    if given is not None:
        return given
    if resumed is not None and resumed.exists():
        seed = _read_settings(resumed).get("seed")
        if isinstance(seed, int):
            return seed
    return int.from_bytes(os.urandom(8), "big") >> 1


def settings_path(output: Path) -> Path:
    return output.with_name(output.name + ".settings.json")


def _done_key(line: bytes, where: str) -> str:
    try:
        row = json.loads(line)
        row_id = row["id"]
        if isinstance(row_id, str | int) and {"text", "finish_reason", "error"} <= set(row):
            return id_key(row_id)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UsageError(f"{where} is no output row of a batch; remove that line, or choose another output")


def _write_settings(path: Path, settings: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(settings | {"version": _VERSION}, ensure_ascii=False, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from error


def _read_settings(output: Path) -> dict[str, Any]:
    path = settings_path(output)
    try:
        settings = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"--resume: {path} is missing, so nothing says how {output} was made; remove that or choose another output"
        ) from None
    except (OSError, ValueError, RecursionError):
        raise UsageError(f"--resume: {path} cannot be read; choose another output") from None
    if not isinstance(settings, dict) or settings.get("version") != _VERSION:
        raise UsageError(f"--resume: {path} is of another version; choose another output")
    return settings


def _compare(output: Path, before: dict[str, Any], now: dict[str, Any], source: BatchInput) -> None:
    different = [
        f"{name} was {json.dumps(before.get(name))} and is {json.dumps(value)}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if different:
        raise UsageError(
            f"--resume: {output} was made with other settings: {', '.join(different)}; "
            "give the same ones, or choose another output"
        )
    known = before.get("input")
    if not isinstance(known, dict) or source.fingerprint(known.get("bytes")) != known:
        raise UsageError(
            f"--resume: the rows of {source.path} are not those that {output} was made from (rows may only be added "
            "at the end); choose another output"
        )
