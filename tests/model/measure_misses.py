"""Measures ``--miss`` on simulated hardware with a checkpoint of Qwen3-30B-A3B's proportions.

``python -m tests.model.measure_misses rtx4060 rtx4090`` prints a table of virtual tokens a second by residency and
strategy, each against what the lanes allow for the hits that were achieved; with ``--replay`` for the whole model.
``--prefetch`` takes ``off``, ``layer-markov``, ``auto`` (when it runs), and ``oracle:R``: a prediction that is right in
a share of R, as published for the next layer's router. A made trace has no router to ask, and a random model's knows
nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cache.events import trace_events
from cache.hardware import HARDWARE
from cache.machines import load_machine
from cache.predictors import PREFETCH_LAYERS
from cache.predictors.oracle import with_recall
from cache.simulate import ReplaySettings, replay_events
from cache.synthetic import MODELS, synthetic_trace
from cache.trace import Trace, load_trace
from offload.config import MISSES
from offload.engine import Engine
from offload.model.experts import ExpertRuntime
from offload.model.prefetch import Guess, Prefetcher
from offload.model.prefetch.auto import AutoPrefetch
from tests.engines import open_tiny
from tests.tiny_models import VOCAB_SIZE, build_tiny

RECORD_BYTES, RECORD_WEIGHTS = 2_654_208, 3 * 2048 * 768
"""Of an expert of Qwen3-30B-A3B in int4: what the scaled records stand for."""
SIZES = {
    "hidden_size": 64,
    "moe_intermediate_size": 24,  # 3 / 8 of the hidden size, as there
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 4,
}
LAYERS = (6, 15, 31, 40)
"""Of its 48: those whose routing the four follow."""
PROMPT = 48
RESIDENCIES = (0.125, 0.25, 0.5)
LAUNCHES = 77  # of a layer, as offload/memory/estimate.py has them


@dataclass(frozen=True, slots=True)
class Measured:
    """``bound`` is the share of the virtual time for which the busier of two lanes was busy: the thread that launches
    kernels, computes experts on the CPU and waits for kernels; and the link. Hits and misses as they were.
    ``reached``, of a replay: the share that :attr:`cache.replay_result.Seconds.least` is of the time."""

    tokens_per_s: float
    prefill_tokens_per_s: float | None
    hit_rate: float
    on_cpu: float
    bound: float
    reached: float | None = None


class Scripted(Prefetcher):
    """Foretells the script with a given recall; see :class:`cache.predictors.oracle.Recalling`."""

    def __init__(self, script: NDArray[np.int64], runtime: ExpertRuntime, layers: Sequence[int], recall: float) -> None:
        super().__init__()
        self._script, self._runtime, self._layers, self._recall = script, runtime, list(layers), recall

    def record_event(self, layer: int, experts: Sequence[int], *, decode: bool) -> None:
        self.worth.record_event(layer, experts, decode=decode)

    def guesses(self, layer: int, hidden: torch.Tensor, limit: int) -> Iterator[Guess]:
        now = self._runtime.current.step * len(self._layers) + self._layers.index(layer)
        for steps in range(1, PREFETCH_LAYERS + 1):
            token, place = divmod(now + steps, len(self._layers))
            if token < len(self._script):
                wanted, experts = self._script[token, place].tolist(), int(SIZES["num_experts"])
                found = with_recall(wanted, experts, self._recall**steps, (now, steps))
                yield self._layers[place], found[:limit]


def build(folder: Path) -> Path:
    return build_tiny("qwen3_moe", folder, sizes=SIZES)


def scaled(name: str, record_bytes: int, folder: Path) -> Path:
    """A file of a machine on which a record of ``record_bytes`` in float32 takes as long as a real one on ``name``."""
    machine = asdict(load_machine(name))
    weights = record_bytes / 4 / RECORD_WEIGHTS
    for field, value in machine.items():
        if field.endswith("_per_s"):
            machine[field] = value * (weights if "flops" in field else record_bytes / RECORD_BYTES)
    path = folder / f"{name}-scaled.json"
    path.write_text(json.dumps(machine | {"name": f"{name}-scaled"}))
    return path


def routing(tokens: int) -> NDArray[np.int64]:
    """Experts [tokens, layers, k] of one request, as the synthetic trace of Qwen3-30B-A3B has them in some layers."""
    trace = synthetic_trace(replace(MODELS["qwen3-30b-a3b"], requests=1, prompt_tokens=0, tokens=tokens))
    return np.stack([trace.ids[trace.layer == layer] for layer in LAYERS], axis=1).astype(np.int64)


def follow(engine: Engine, script: NDArray[np.int64]) -> None:
    """Let the model choose these experts, token by token, whatever its routers say: a random model has no habits."""
    runtime = engine._runtime
    real = runtime.run

    def run(module: Any, layer: int, hidden: Any, index: Any, weights: Any) -> torch.Tensor:
        first = runtime.current.step
        chosen = torch.from_numpy(script[first : first + len(hidden), layer])
        return real(module, layer, hidden, chosen.to(index.device), weights)

    runtime.run = run  # type: ignore[method-assign]


def measure(
    checkpoint: Path, packs: Path, hardware: Path | str, tokens: int = 128, recall: float | None = None, **settings: Any
) -> Measured:
    """Prefill a prompt and decode ``tokens``; decoding is measured from its second half on, when slots are full.

    With ``recall`` a :class:`Scripted` prefetch takes the place of the one that the settings name, or that of
    ``next-gate`` among the candidates of ``auto``.
    """
    with open_tiny(checkpoint, packs, device=f"simulated:{hardware}", context_tokens=512, **settings) as engine:
        clock, runtime, passes = engine._device, engine._runtime, engine._passes
        script = routing(PROMPT + tokens)
        follow(engine, script)
        if recall is not None:
            scripted = Scripted(script, runtime, sorted(module.layer for module in engine._modules), recall)
            if isinstance(runtime.predictor, AutoPrefetch):
                runtime.predictor._candidates["next-gate"] = scripted
            else:
                runtime.predictor = scripted
        link: Any = runtime.loads.link

        def now() -> tuple[float, ...]:
            counts, transfers = runtime.cache.counters.decode, runtime.transfers
            stalled = transfers.stall_seconds + (runtime.loads.stall_link_seconds() or 0.0)
            return (clock.now(), stalled, link.host_to_device, counts.hits, counts.accesses, transfers.computed_on_cpu)

        began = clock.now()
        passes.run([token % VOCAB_SIZE for token in range(PROMPT)], decode=False, ends=True)
        prefill = clock.now() - began
        before = now()
        for number in range(tokens):
            if number == tokens // 2:
                before = now()
            token_began = clock.now()
            passes.run([number % VOCAB_SIZE], decode=True)
            runtime.end_token(clock.now() - token_began)
        seconds, stalled, moved, hits, accesses, on_cpu = (b - a for a, b in zip(before, now(), strict=True))
        machine = clock.machine  # type: ignore[attr-defined]
        busy = moved / machine.link_bytes_per_s + moved / engine.plan.sizes.slot_bytes * machine.load_s
        share = max(seconds - stalled, busy) / seconds
        return Measured((tokens - tokens // 2) / seconds, PROMPT / prefill, hits / accesses, on_cpu / accesses, share)


def replayed(name: str, trace: Trace, residency: float, miss: str, prefetch: str = "off") -> Measured:
    """The whole model, every record in RAM: a replay of ``trace``, with what a token costs beside its experts."""
    events = trace_events(trace)
    layers = len(events.layers())
    slots = round(layers * int(SIZES["num_experts"]) * residency)
    hardware = replace(HARDWARE[name], disk_bytes_per_s=None, dense_s=layers * LAUNCHES * load_machine(name).launch_s)
    predictor = None if prefetch == "off" else prefetch
    settings = ReplaySettings(slots=slots, record_bytes=RECORD_BYTES, hardware=hardware, miss=miss, predictor=predictor)
    found = replay_events(events, settings)
    seconds, total = found.seconds, found.total
    assert seconds is not None
    bound = max(seconds.compute, seconds.link) / seconds.total
    return Measured(
        seconds.tokens_per_s or 0.0,
        None,
        total.hit_rate or 0.0,
        float(total.on_cpu.sum()) / total.accesses,
        bound,
        seconds.least / seconds.total,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("machines", nargs="+")
    parser.add_argument("--prefetch", default=["off"], nargs="+")
    parser.add_argument("--recall", type=float, help="of auto's first candidate, when it runs")
    parser.add_argument("--miss", default=MISSES, nargs="+")
    parser.add_argument("--tokens", type=int, default=128, help="to decode, when it runs")
    parser.add_argument("--replay", nargs="?", const="", metavar="TRACE", help="of the whole model, without computing")
    given = parser.parse_args()
    print("| machine | residency | --miss | --prefetch | tokens/s | lanes | reached | hits | on the CPU | prefill |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    if given.replay is not None:
        habits = replace(MODELS["qwen3-30b-a3b"], requests=2, tokens=128)
        trace = load_trace(Path(given.replay)) if given.replay else synthetic_trace(habits)
        for name, residency, miss, prefetch in product(given.machines, RESIDENCIES, given.miss, given.prefetch):
            show(name, residency, miss, prefetch, replayed(name, trace, residency, miss, prefetch))
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        checkpoint = build(folder / "checkpoint")
        with open_tiny(checkpoint, folder, residency=0.01) as engine:
            record = engine.plan.sizes.slot_bytes
        for name, residency, miss, prefetch in product(given.machines, RESIDENCIES, given.miss, given.prefetch):
            kind, _, recall = prefetch.partition(":")
            settings = {"residency": residency, "miss": miss, "prefetch": "off" if kind == "oracle" else kind}
            share = float(recall) if recall else (given.recall if kind == "auto" else None)
            machine = scaled(name, record, folder)
            found = measure(checkpoint, folder, machine, given.tokens, share, **settings)
            show(name, residency, miss, prefetch, found)


def show(name: str, residency: float, miss: str, prefetch: str, found: Measured) -> None:
    prefill = "" if found.prefill_tokens_per_s is None else f"{found.prefill_tokens_per_s:.0f}"
    reached = "" if found.reached is None else f"{found.reached:.2f}"
    print(
        f"| {name} | {residency:.1%} | {miss} | {prefetch} | {found.tokens_per_s:.1f} | {found.bound:.2f} | "
        f"{reached} | {found.hit_rate:.0%} | {found.on_cpu:.0%} | {prefill} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
