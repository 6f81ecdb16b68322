"""How fast a model would decode on a named machine under a plan, and what holds it back. A pure function."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from cache.keys import ExpertKey
from cache.machines import Machine
from cache.misses import ExpertWork, MissPlanner, MissRates
from offload.memory.hit_rates import expected_hit_rate
from offload.memory.tier_plan import TierPlan

_LAUNCHES = 77
"""Operations that PyTorch launches for one layer of today's models in eager mode (counted for Qwen3-MoE)."""
_GRAPH_LAUNCHES = 7
"""With ``--graphs``: the graph, and what the experts take (counted on the simulated device, docs/devices.md)."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a token takes: MoE layers, and experts in each of them."""

    layers: int
    top_k: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds for one decoded token by lane. Kernels wait for their launches, and both wait for the misses:
    ``misses_s`` is what link and CPU take for those in RAM, side by side in each event; the disk works beside them on
    other records. ``hit_rate`` and ``host_hit_rate`` are those assumed; ``graphs``: decode passes are replayed.
    """

    machine: str
    hit_rate: float
    host_hit_rate: float
    launches_s: float
    kernels_s: float
    link_s: float
    disk_s: float
    miss: str = "fetch"
    cpu_s: float = 0.0
    misses_s: float = 0.0
    graphs: bool = False

    @property
    def tokens_per_s(self) -> float:
        return 1 / (max(self.launches_s, self.kernels_s) + max(self.misses_s, self.disk_s))

    @property
    def bottleneck(self) -> str:
        lanes = {
            "disk": self.disk_s,
            "link": self.link_s,
            "CPU": self.cpu_s,
            "device memory": self.kernels_s,
            "launches": self.launches_s,
        }
        return max(lanes, key=lambda lane: lanes[lane])

    def summary(self) -> list[str]:
        lanes = (
            f"launches {1e3 * self.launches_s:.1f} ms, kernels {1e3 * self.kernels_s:.1f}, "
            f"link {1e3 * self.link_s:.1f}, disk {1e3 * self.disk_s:.1f}, experts on the CPU {1e3 * self.cpu_s:.1f}"
        )
        found = f"{self.hit_rate:.0%} of the experts found in VRAM, {self.host_hit_rate:.0%} of the rest in RAM"
        advice = _ADVICE[self.bottleneck]
        if self.bottleneck == "launches" and self.graphs:
            advice = "no flag helps: the device waits for the CPU"
        return [
            f"expected on {self.machine}: {self.tokens_per_s:.1f} tokens/s, held back by the {self.bottleneck} "
            f"(a token: {lanes}); {found}",
            f"to go faster: {advice}",
        ]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_s": self.tokens_per_s, "bottleneck": self.bottleneck}


_ADVICE = {
    "disk": "a larger --ram holds more experts; --format int4 makes them smaller; --tiers exclusive holds more where "
    "VRAM and RAM are of a size",
    "link": "a larger --vram or a smaller --ctx gives more slots; --format int4 makes experts smaller; --dense-format "
    "int8 makes room",
    "CPU": "a larger --vram or a smaller --ctx gives more slots; --format int4 makes experts smaller",
    "device memory": "--format int4 and --dense-format int8 give the device fewer bytes to read",
    "launches": "--graphs on launches what stands between the experts as one",
}


def estimate(plan: TierPlan, work: Work, machine: Machine, miss: str = "fetch") -> Estimate:
    """Decoding one token at a time, the prompt behind it, caches warm, and misses that lie in RAM treated as ``miss``
    says. The hit rate is taken to be the same each way."""
    sizes = plan.sizes
    record = sizes.slot_bytes
    accesses = work.layers * work.top_k
    in_vram, in_memory = expected_hit_rate(plan.residency), expected_hit_rate(plan.in_memory)
    misses = accesses * (1 - in_vram)
    reads = accesses * (1 - max(in_vram, in_memory))
    copy_s = record / machine.link_bytes_per_s + machine.load_s
    fetched, computed, waited = _in_ram(work.top_k, (misses - reads) / accesses, record, machine, miss)
    return Estimate(
        machine=machine.title,
        hit_rate=in_vram,
        host_hit_rate=1 - reads / misses if misses else 1.0,
        launches_s=work.layers * (_GRAPH_LAUNCHES if sizes.graph_bytes else _LAUNCHES) * machine.launch_s,
        kernels_s=(sizes.skeleton_bytes + (accesses - work.layers * computed) * record) / machine.expert_bytes_per_s
        + work.layers * machine.event_s,
        link_s=(work.layers * fetched + reads) * copy_s,
        disk_s=reads * (record / machine.disk_bytes_per_s + machine.load_s),
        miss=miss,
        cpu_s=work.layers * computed * record / machine.host_bytes_per_s,
        misses_s=work.layers * waited + reads * copy_s,
        graphs=sizes.graph_bytes > 0,
    )


def _in_ram(top_k: int, share: float, record: int, machine: Machine, miss: str) -> tuple[float, float, float]:
    """Of an event whose experts are each with probability ``share`` a miss that lies in RAM: the copies that it waits
    for, the experts that the CPU computes, and the seconds of the slower of both. Means over the number of misses."""
    planner = MissPlanner(MissRates.of_machine(machine), miss)
    expert = ExpertWork(record, 0.0)
    keys = [ExpertKey(0, number) for number in range(top_k)]
    tokens = dict.fromkeys(range(top_k), 1)
    fetched = computed = waited = 0.0
    for count in range(top_k + 1):
        chance = math.comb(top_k, count) * share**count * (1 - share) ** (top_k - count)
        on_cpu = len(planner.on_cpu(keys[:count], tokens, expert, hits=keys[count:]))
        link = (count - on_cpu) * planner.copy_s(expert)
        cpu = on_cpu * planner.host_s(expert) + (2 * machine.load_s if on_cpu else 0.0)
        cpu += min(cpu, link) * machine.link_bytes_per_s / machine.host_bytes_per_s
        fetched += chance * (count - on_cpu)
        computed += chance * on_cpu
        waited += chance * max(link, cpu)
    return fetched, computed, waited
