"""What this machine can do, measured once and stored: rates of disk, memory and kernels, and the kernels' crossover.

The crossover, the number of tokens from which the way for many (``product.py``) beats the kernels for few,
decides how a product is rounded. So it is measured at the first use of quantised weights, or by ``bench --calibrate``,
and kept. It is never below :data:`~offload.compute.product.DEFAULT_FEW_TOKENS`: so rows that decode together have the
bits that they have alone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cache.keys import ExpertKey
from offload.compute.kernels import Kernels, load_kernels
from offload.compute.matrix import MatrixLayout, QuantizedMatrix, empty_matrix
from offload.compute.product import DEFAULT_FEW_TOKENS, Products
from offload.config import format_size
from offload.devices.host_memory import HostMemory
from offload.errors import RunLocalError
from offload.events import LoadProgress
from offload.memory.lanes import DiskLane, Ticket
from offload.paths import cache_folder

OnProgress = Callable[[LoadProgress], None]

_VERSION = 5  # of what the crossover compares and how the disk is read
_TRIALS = (24, 32, 48, 64, 96, 128)
_ROWS, _COLUMNS = 1536, 2048  # about an expert of today's models
_MANY = 512
_PROBE_BYTES = 1024 * 2**20
_RECORD_BYTES = 3 * 2**20
_READERS = 4
_IN_FLIGHT = 8  # as many as a prompt has
_REPEATS = 4
_SECONDS = 0.5  # of one repeat of reads, and of products


@dataclass(frozen=True, slots=True)
class Calibration:
    """``machine`` tells whose figures these are. Rates in bytes of weights, file or memory a second, None if unknown.

    ``few_tokens`` is the most tokens that the kernels multiply, by number of bits; empty without kernels.
    """

    machine: str
    few_tokens: dict[int, int]
    memory_bytes_per_s: float | None = None
    disk_bytes_per_s: float | None = None
    int4_bytes_per_s: float | None = None
    int8_bytes_per_s: float | None = None
    flops_per_s: float | None = None
    int4_flops_per_s: float | None = None
    int8_flops_per_s: float | None = None

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, figure, remark) for people."""

        def rate(value: float | None) -> str:
            return "-" if value is None else f"{value / 1e9:.1f} GB/s"

        kernels = "one token; the memory's rate is the limit"
        rows = [
            ("memory", rate(self.memory_bytes_per_s), f"reads of {torch.get_num_threads()} threads"),
            ("disk", rate(self.disk_bytes_per_s), f"random reads of 3 MiB, {_READERS} at a time"),
            ("int4 kernel", rate(self.int4_bytes_per_s), kernels),
            ("int8 kernel", rate(self.int8_bytes_per_s), kernels),
        ]
        for name, flops, how in (
            ("many tokens", self.flops_per_s, "in bf16, by the library"),
            ("int4, many tokens", self.int4_flops_per_s, "with weights of 4 bits"),
            ("int8, many tokens", self.int8_flops_per_s, "with weights of 8 bits"),
        ):
            found = "-" if flops is None else f"{flops / 1e9:.0f} GFLOP/s"
            rows.append((name, found, f"products of {_MANY} tokens {how}"))
        for bits, tokens in sorted(self.few_tokens.items()):
            rows.append(
                (f"int{bits} crossover", f"{tokens} tokens", "most tokens for the kernel that takes few at a time")
            )
        return rows

    def weights_bytes_per_s(self, name: str) -> float | None:
        """How fast one token is multiplied with weights of format ``name``; None if that was not measured."""
        if name == "native":
            return self.memory_bytes_per_s
        return self.int8_bytes_per_s if name == "int8" else self.int4_bytes_per_s

    def flops(self) -> dict[int, float] | None:
        """Operations a second of products with many tokens, by the bits of the weights, 0 for the library's bfloat16;
        None if one is not known. Without kernels the library multiplies all.
        """
        library, kernels = self.flops_per_s, (self.int4_flops_per_s, self.int8_flops_per_s)
        if library is None or (self.few_tokens and None in kernels):
            return None
        return {0: library, 4: kernels[0] or library, 8: kernels[1] or library}

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"version": _VERSION}


def crossover(kernels: Kernels | None, on_progress: OnProgress) -> dict[int, int]:
    """The stored crossover of this machine; measures and stores it if there is none. Empty without kernels."""
    if kernels is None:
        return {}
    stored = load()
    if stored is not None and stored.few_tokens:
        return stored.few_tokens
    few = _measure_crossover(kernels, on_progress)
    with contextlib.suppress(RunLocalError):  # a cache folder that cannot be written costs the time again, no more
        save(replace(stored or Calibration(machine_key(), {}), few_tokens=few))
    return few


def cpu_rates(weight_format: str, kernels: Kernels | None, on_progress: OnProgress) -> tuple[float, float]:
    """(bytes of experts' weights with one token, operations with many) a second of this CPU, as they are stored;
    measures and stores what is missing.

    The bytes are those of the kernel for the format's bits, or else the memory's.
    """
    bits = next(
        (bits for bits in (4, 8) if weight_format.startswith(f"int{bits}")), 4 if weight_format == "mixed" else 0
    )
    name = f"int{bits}_bytes_per_s" if bits and kernels is not None else "memory_bytes_per_s"
    known = load() or Calibration(machine_key(), {})
    missing: dict[str, float] = {}
    if getattr(known, name) is None:
        on_progress(LoadProgress("measure", 0, 2, "steps"))
        missing[name] = (
            _memory_rate() if kernels is None or not bits else _kernel_rate(Products(kernels, 1 << 30), bits)
        )
    flops_name = f"int{bits}_flops_per_s" if bits and kernels is not None else "flops_per_s"
    if getattr(known, flops_name) is None:
        on_progress(LoadProgress("measure", 1, 2, "steps"))
        missing[flops_name] = _flops() if kernels is None or not bits else _kernel_flops(Products(kernels, 0), bits)
    if missing:
        on_progress(LoadProgress("measure", 2, 2, "steps"))
        known = replace(known, **missing)  # type: ignore[arg-type]
        with contextlib.suppress(RunLocalError):
            save(known)
    return getattr(known, name), getattr(known, flops_name)


def calibrate(folder: Path, on_progress: OnProgress) -> Calibration:
    """Measure everything; takes some seconds. The disk is that of ``folder``, where a file is written and removed.

    Raises RunLocalError if the disk has no room.
    """
    kernels = load_kernels()
    few = {} if kernels is None else _measure_crossover(kernels, on_progress)
    rates: dict[int, float | None] = {4: None, 8: None}
    many = dict(rates)
    if kernels is not None:
        rates = {bits: _kernel_rate(Products(kernels, 1 << 30), bits) for bits in rates}
        many = {bits: _kernel_flops(Products(kernels, 0), bits) for bits in rates}
    disk = _disk_rate(folder, on_progress)
    return Calibration(machine_key(), few, _memory_rate(), disk, rates[4], rates[8], _flops(), many[4], many[8])


def machine_key() -> str:
    """What the figures depend on: the processor and the number of threads."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def calibration_file() -> Path:
    return cache_folder() / "calibration.json"


def load() -> Calibration | None:
    """The stored figures of this machine, or None: a damaged file and another machine's count as nothing."""
    try:
        data = json.loads(calibration_file().read_text("utf-8"))
        if data.pop("version") != _VERSION:
            return None
        few = {int(bits): int(tokens) for bits, tokens in data.pop("few_tokens").items()}
        found = Calibration(few_tokens=few, **data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if found.machine == machine_key() else None


def save(calibration: Calibration) -> Path:
    """Store the figures, in place of any others. Raises RunLocalError if they cannot be written."""
    path = calibration_file()
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(calibration.to_json(), indent=1) + "\n", "utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise RunLocalError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def _measure_crossover(kernels: Kernels, on_progress: OnProgress) -> dict[int, int]:
    few = {}
    for done, bits in enumerate((4, 8)):
        on_progress(LoadProgress("measure", done, 2, "steps"))
        few[bits] = _crossover_of(kernels, bits)
    on_progress(LoadProgress("measure", 2, 2, "steps"))
    return few


def _crossover_of(kernels: Kernels, bits: int) -> int:
    """The last trial before the way for many wins twice in a row; one loss may be another program's doing."""
    matrix = _random_matrix(bits)
    by_kernel, decoded = Products(kernels, 1 << 30), Products(kernels, 0)
    best, losses = DEFAULT_FEW_TOKENS, 0
    for tokens in _TRIALS:
        inputs = torch.randn(tokens, _COLUMNS).to(torch.bfloat16)
        # in turn, so that what else the machine does hits both
        times = [(_seconds(by_kernel, matrix, inputs), _seconds(decoded, matrix, inputs)) for _ in range(5)]
        if min(first for first, _ in times) <= min(second for _, second in times):
            best, losses = tokens, 0
        else:
            losses += 1
            if losses == 2:
                break
    return best


def _kernel_rate(products: Products, bits: int) -> float:
    """Bytes of weights a second with one token, over matrices that together are larger than the caches."""
    matrices = [_random_matrix(bits) for _ in range(max(1, 256 * 2**20 // _random_matrix(bits).layout.bytes))]
    inputs = torch.randn(1, _COLUMNS).to(torch.bfloat16)
    fastest = min(sum(_seconds(products, matrix, inputs) for matrix in matrices) for _ in range(5))
    return sum(matrix.layout.bytes for matrix in matrices) / fastest


def _random_matrix(bits: int) -> QuantizedMatrix:
    matrix = empty_matrix(MatrixLayout.make(_ROWS, _COLUMNS, bits))
    matrix.codes.random_(0, 100)
    matrix.params.fill_(0.01)
    return matrix


def _seconds(products: Products, matrix: QuantizedMatrix, inputs: torch.Tensor) -> float:
    started = time.perf_counter()
    products.linear(matrix, inputs)
    return time.perf_counter() - started


def _flops() -> float:
    weight, inputs = torch.randn(_ROWS, _COLUMNS).bfloat16(), torch.randn(_MANY, _COLUMNS).bfloat16()
    return _many_rate(lambda: torch.nn.functional.linear(inputs, weight))


def _kernel_flops(products: Products, bits: int) -> float:
    matrix, inputs = _random_matrix(bits), torch.randn(_MANY, _COLUMNS).bfloat16()
    return _many_rate(lambda: products.linear(matrix, inputs))


def _many_rate(product: Callable[[], object]) -> float:
    """Operations a second of the fastest in some time: a few calls may all meet another program's work."""
    fastest, until = float("inf"), time.perf_counter() + _SECONDS
    while (started := time.perf_counter()) < until:
        product()
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * _MANY * _ROWS * _COLUMNS / fastest


def _memory_rate() -> float:
    data = torch.zeros(256 * 2**20 // 8, dtype=torch.int64)
    fastest = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        fastest = min(fastest, time.perf_counter() - started)
    return data.nbytes / fastest


def _disk_rate(folder: Path, on_progress: OnProgress) -> float | None:
    """Random reads as the disk lane makes them; None where the file system cannot read past the page cache."""
    if not hasattr(os, "O_DIRECT"):
        return None
    path = folder / f"probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _write_probe(path, on_progress)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            try:
                return _read_probe(fd)
            finally:
                os.close(fd)
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        if error.errno == 22:  # EINVAL: no O_DIRECT here
            return None
        raise RunLocalError(
            f"{folder}: the disk cannot be measured ({error.strerror}); a file of {format_size(_PROBE_BYTES)} must fit "
            "there, or name another folder with --experts-dir"
        ) from error


def _write_probe(path: Path, on_progress: OnProgress) -> None:
    block = random.Random(0).randbytes(2**22)
    with open(path, "wb") as file:
        for done in range(0, _PROBE_BYTES, len(block)):
            on_progress(LoadProgress("probe", done, _PROBE_BYTES, "bytes"))
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    on_progress(LoadProgress("probe", _PROBE_BYTES, _PROBE_BYTES, "bytes"))


def _read_probe(fd: int) -> float:
    """The best of some repeats, by a run's own workers into memory like that of its slots; each record once in turn."""
    records = _PROBE_BYTES // _RECORD_BYTES
    order = itertools.cycle(random.Random(0).sample(range(records), records))
    memory = HostMemory(_IN_FLIGHT, _RECORD_BYTES, "the probe of the disk", used=_IN_FLIGHT)
    memory.array()[:] = 0  # a slot's pages are there, too
    lane = DiskLane(_Probe(fd), _READERS, "probe")
    best = 0.0

    def load(slot: int) -> tuple[int, Ticket]:
        return slot, lane.load(ExpertKey(0, next(order)), memory.buffer(slot))

    try:
        for _ in range(_REPEATS):
            done, started = 0, time.perf_counter()
            flying = deque(load(slot) for slot in range(_IN_FLIGHT))
            while flying:
                slot, ticket = flying.popleft()
                done += ticket.wait()[0]
                if time.perf_counter() - started < _SECONDS:
                    flying.append(load(slot))
            best = max(best, done / (time.perf_counter() - started))
    finally:
        lane.close()
        memory.close()
    return best


class _Probe:
    """What the lane's workers do: read a record of the probe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read_into(self, key: ExpertKey, buffer: memoryview) -> int:
        return os.preadv(self._fd, [buffer], key.expert * _RECORD_BYTES)
