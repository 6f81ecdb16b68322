"""Measures prompts on simulated hardware: the share of the time for which the link copies, and the kernels compute.

``python -m tests.model.measure_prefill rtx4060`` prints a table by the virtual clock, for OLMoE's shape in int4. All
experts are in RAM, a part of them in VRAM. A prompt runs as one pass, or in chunks (``--chunk``), and may be of several
rows (``--rows``). The model that runs is smaller, and so is the machine: hidden size, width of the experts and tokens
are an eighth, so that all operations and bytes are the same part of the real ones.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from cache.machines import load_machine
from offload.config import SamplingSettings
from offload.engine import Engine
from offload.protocol import PreparedRow
from tests.engines import finish, open_tiny
from tests.tiny_models import build_tiny

SCALE = 8
HIDDEN, INNER = 2048, 1024
RECORD_BYTES = 3 * HIDDEN * INNER * 9 // 16
"""Of an expert of OLMoE in int4: what the scaled records stand for."""
SIZES = {
    "hidden_size": HIDDEN // SCALE,
    "intermediate_size": INNER // SCALE,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_local_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
}
WARM_UP = 2  # prompts before the one that is measured


@dataclass(frozen=True, slots=True)
class Prefill:
    """Virtual seconds of one prompt, and for how long of them link and kernels were busy. ``read_ratio``: bytes that
    were copied, of those that the passes needed and did not find."""

    seconds: float
    link: float
    kernels: float
    read_ratio: float
    hits: float


def scaled(name: str, record_bytes: int, folder: Path) -> Path:
    """A file of a machine for which the scaled model is as much work as the real one is for ``name``."""
    machine = asdict(load_machine(name))
    for field, value in machine.items():
        if "flops" in field:
            machine[field] = value / SCALE**3
        elif field.endswith("_per_s"):
            machine[field] = value * record_bytes / RECORD_BYTES
    path = folder / f"{name}-scaled.json"
    path.write_text(json.dumps(machine | {"name": f"{name}-scaled"}))
    return path


def balance(engine: Engine) -> None:
    """Let every token choose experts by lot, whatever the routers say: a random model has favourites."""
    runtime, chance = engine._runtime, torch.Generator().manual_seed(0)
    real, experts, top_k = runtime.run, int(SIZES["num_experts"]), int(SIZES["num_experts_per_tok"])

    def run(module: Any, layer: int, hidden: Any, index: Any, weights: Any) -> torch.Tensor:
        chosen = torch.rand(len(hidden), experts, generator=chance).topk(top_k).indices
        return real(module, layer, hidden, chosen.to(index.device), weights)

    runtime.run = run  # type: ignore[method-assign]


def measure(
    checkpoint: Path,
    packs: Path,
    hardware: Path | str,
    tokens: int,
    rows: int = 1,
    chunk: int | None = None,
    **settings: Any,
) -> Prefill:
    """The last of some prompts of ``tokens`` in all, which ``rows`` rows share."""
    settings = {
        "context_tokens": tokens // rows + 16,
        "prefill_chunk": chunk or tokens,
        "batch_rows": rows,
        "format": "int4",
        "miss": "fetch",
    } | settings
    with open_tiny(checkpoint, packs, device=f"simulated:{hardware}", **settings) as engine:
        balance(engine)
        clock: Any = engine._device.clock  # type: ignore[attr-defined]
        launch, busy = clock.launch, [0.0]

        def timed(*args: float, **more: float) -> float:
            free = max(clock.kernels_free_at, clock.now + clock.machine.launch_s)
            done: float = launch(*args, **more)
            busy[0] += done - free
            return done

        clock.launch = timed
        link: Any = engine._runtime.loads.link
        before: tuple[float, ...] = ()
        for number in range(WARM_UP + 1):
            if number == WARM_UP:
                before = _now(engine, link, busy[0])
            prompt(engine, tokens // rows, rows, number)
        seconds, moved, computed, needed, hits, accesses = (
            b - a for a, b in zip(before, _now(engine, link, busy[0]), strict=True)
        )
        machine, record = clock.machine, engine.plan.sizes.slot_bytes
        copying = moved / machine.link_bytes_per_s + moved / record * machine.load_s
        return Prefill(seconds, copying, computed, moved / needed if needed else 1.0, hits / accesses)


def _now(engine: Engine, link: Any, busy: float) -> tuple[float, ...]:
    counts, transfers = engine._runtime.cache.counters.prefill, engine._runtime.transfers
    return engine._device.now(), link.host_to_device, busy, transfers.needed_bytes, counts.hits, counts.accesses


def prompt(engine: Engine, tokens: int, rows: int, number: int) -> None:
    """``rows`` random prompts that have no beginning in common, each answered by one token."""
    sampling = SamplingSettings(temperature=0, max_new_tokens=1)
    ids = [[(number * rows + row) * 7919 + place * 104729 for place in range(tokens)] for row in range(rows)]
    ordinary = engine.ordinary_ids()
    prompts = [[ordinary[token % len(ordinary)] for token in row] for row in ids]
    if rows == 1:
        finish(engine.generate_ids(prompts[0], sampling))
        return
    waiting = [PreparedRow(tuple(row), sampling) for row in prompts]
    for _ in engine.generate_rows(lambda room: waiting.pop() if waiting else None):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("machines", nargs="+")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--residency", type=float, default=0.28)
    parser.add_argument("--miss", default="fetch")
    given = parser.parse_args()
    print("| machine | tokens | virtual time | link busy | kernels busy | read of what was needed | hits |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        checkpoint = build_tiny("olmoe", folder / "checkpoint", torch.bfloat16, sizes=SIZES)
        with open_tiny(checkpoint, folder, residency=0.01, format="int4") as engine:
            record = engine.plan.sizes.slot_bytes
        chunk = None if given.chunk is None else given.chunk // SCALE
        for machine, tokens in product(given.machines, given.tokens):
            hardware = scaled(machine, record, folder)
            settings = {"residency": given.residency, "miss": given.miss}
            found = measure(checkpoint, folder, hardware, tokens // SCALE, given.rows, chunk, **settings)
            print(
                f"| {machine} | {tokens} | {1000 * found.seconds:.1f} ms | {found.link / found.seconds:.0%} | "
                f"{found.kernels / found.seconds:.0%} | {found.read_ratio:.3f} | {found.hits:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
