"""The file of a reference's probabilities: written by one run, read piece by piece by those compared with it.

For each counted position the :data:`KEPT_TOKENS` likeliest tokens with their log-probabilities (float32), and the log
of what all others have together. A vocabulary that is not larger is kept whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch

from offload.config import format_size
from offload.errors import RunLocalError, UsageError

KEPT_TOKENS = 1024
_MAGIC = b"run-local reference 1\n"
_HEADER_BYTES = 4096
_SPARE_BYTES = 256 * 2**20
"""Left free on the disk for everybody else."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What must be the same on both sides. ``digest`` is over the ids of the tokens, windows apart."""

    model: str
    vocabulary: int
    window_tokens: int
    positions: int
    digest: str

    @property
    def kept(self) -> int:
        """Tokens kept for each position."""
        return min(KEPT_TOKENS, self.vocabulary)


def token_digest(windows: list[list[int]]) -> str:
    digest = hashlib.sha256()
    for window in windows:
        digest.update(np.asarray([len(window), *window], "<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Piece:
    """Log-probabilities of n positions: of their next token [n], of the tokens ``ids`` [n, k], and the log of what all
    other tokens have together [n]; ``top`` [n] is the likeliest token."""

    next: torch.Tensor
    ids: torch.Tensor
    logp: torch.Tensor
    rest: torch.Tensor
    top: torch.Tensor


def take_piece(logits: torch.Tensor, targets: torch.Tensor, ids: torch.Tensor | int) -> Piece:
    """Of ``logits`` [n, V], which are overwritten; ``ids`` are those of the reference [n, k], or how many to keep.

    The same logits give the same bits whichever way the ids came, so that a setting has no distance to itself.
    """
    logp = logits.sub_(logits.logsumexp(-1, keepdim=True))
    top = logp.argmax(-1)
    following = logp.gather(1, targets[:, None])[:, 0].clone()
    if isinstance(ids, int):
        ids = logp.topk(ids, sorted=False).indices
    kept = logp.gather(1, ids)
    rest = logp.scatter_(1, ids, -torch.inf).logsumexp(-1)
    return Piece(following, ids, kept, rest, top)


def divergence(reference: Piece, other: Piece) -> torch.Tensor:
    """KL(reference || other) in nats for each position [n], float64, with all tokens that are not kept taken as one.

    That is exact where the vocabulary is kept whole, and else never more than the true value.
    """
    p = torch.cat((reference.logp, reference.rest[:, None]), 1).double()
    q = torch.cat((other.logp, other.rest[:, None]), 1).double()
    terms = torch.where(torch.isneginf(p), torch.zeros_like(p), p.exp() * (p - q))
    return terms.sum(1)


def _record(kept: int) -> np.dtype[Any]:
    return np.dtype(
        [("ids", "<i4", (kept,)), ("logp", "<f4", (kept,)), ("rest", "<f4"), ("top", "<i4"), ("next", "<f4")]
    )


class ReferenceWriter:
    """Writes the file ``path``. Raises UsageError if it cannot be made, RunLocalError if the disk is too small."""

    def __init__(self, path: Path, evaluated: Evaluated) -> None:
        self._path = path
        self._record = _record(evaluated.kept)
        needed = _HEADER_BYTES + evaluated.positions * self._record.itemsize
        try:
            self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by close()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"--reference-out: {path} cannot be written ({reason})") from error
        try:
            free = _free_bytes(self._file)
            if needed + _SPARE_BYTES > free:
                raise RunLocalError(
                    f"the reference's probabilities need {format_size(needed)} of disk, and {format_size(free)} are "
                    f"free there ({format_size(_SPARE_BYTES)} of them are left alone): give fewer --tokens, or "
                    "another place (--compare uses the folder that TMPDIR names)"
                )
            header = _MAGIC + json.dumps(asdict(evaluated)).encode()
            self._write(header.ljust(_HEADER_BYTES, b"\n"))
        except BaseException:
            self._file.close()
            raise

    def add(self, piece: Piece) -> None:
        rows = np.empty(len(piece.top), self._record)
        for name in ("ids", "logp", "rest", "top", "next"):
            rows[name] = getattr(piece, name).numpy()
        self._write(rows.tobytes())

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise self._failure(error) from error

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> RunLocalError:
        return RunLocalError(f"{self._path}: the reference cannot be written ({error.strerror}); make room")

    def __enter__(self) -> ReferenceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ReferenceReader:
    """Reads the file ``path`` in order. Raises UsageError if it is none, or one of other tokens than ``evaluated``."""

    def __init__(self, path: Path, evaluated: Evaluated) -> None:
        self._path = path
        self._record = _record(evaluated.kept)
        try:
            self._file: BinaryIO = open(path, "rb")  # noqa: SIM115 - closed by close()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"--reference: {path} cannot be read ({reason})") from error
        try:
            self._check(evaluated)
        except BaseException:
            self._file.close()
            raise

    def next(self, positions: int) -> Piece:
        """The next ``positions`` of the reference. Raises RunLocalError if the file has ended."""
        data = self._read(positions * self._record.itemsize)
        if len(data) < positions * self._record.itemsize:
            raise RunLocalError(f"{self._path}: the reference ends too early")
        rows = np.frombuffer(data, self._record)
        return Piece(
            torch.from_numpy(rows["next"].copy()),
            torch.from_numpy(rows["ids"].astype(np.int64)),
            torch.from_numpy(rows["logp"].copy()),
            torch.from_numpy(rows["rest"].copy()),
            torch.from_numpy(rows["top"].astype(np.int64)),
        )

    def close(self) -> None:
        self._file.close()

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            raise RunLocalError(f"{self._path}: the reference cannot be read ({error.strerror})") from error

    def _check(self, evaluated: Evaluated) -> None:
        self._file.seek(0)  # where /dev/fd/N shares the position with the writer
        header = self._read(_HEADER_BYTES)
        try:
            found = json.loads(header.removeprefix(_MAGIC)) if header.startswith(_MAGIC) else None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UsageError(f"--reference: {self._path} is no file of --reference-out")
        for name, what in (
            ("vocabulary", "tokens in its vocabulary"),
            ("window_tokens", "tokens in a window (--ctx)"),
            ("positions", "tokens to predict"),
            ("digest", ""),
        ):
            theirs, ours = found.get(name), getattr(evaluated, name)
            same = found.get("digest") == evaluated.digest and name != "vocabulary"  # windows may be larger than a text
            if theirs != ours and not same:
                how = f"{theirs} {what} where this run has {ours}" if what else "other tokens"
                raise UsageError(
                    f"--reference: {self._path} was made from {found.get('model')} with {how}; both sides must see the "
                    "same tokens in the same windows"
                )
        whole = _HEADER_BYTES + evaluated.positions * self._record.itemsize
        if os.fstat(self._file.fileno()).st_size != whole:
            raise UsageError(f"--reference: {self._path} is not whole; write it again")

    def __enter__(self) -> ReferenceReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _free_bytes(file: BinaryIO) -> int:
    """Room on the file's own disk for this user."""
    disk = os.fstatvfs(file.fileno())
    return disk.f_bavail * disk.f_frsize
