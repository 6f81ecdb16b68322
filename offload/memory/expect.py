"""How fast a model would decode on this machine's processor under a plan, and what holds it back. A pure function."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from offload.config import format_size
from offload.memory.plan import Plan


@dataclass(frozen=True, slots=True)
class CpuRates:
    """Bytes a second as ``bench --calibrate`` measured them: from disk, of the experts' weights and of all others'."""

    disk: float
    experts: float
    dense: float


@dataclass(frozen=True, slots=True)
class CpuEstimate:
    """Seconds for one decoded token: reads, and the products with the skeleton, with hits and with misses.

    Hits are computed while misses are read, and all else waits: the token takes ``dense_s``, the longer of ``hits_s``
    and ``disk_s``, and ``misses_s``. ``hit_rate`` is the one assumed, ``all_ram_bytes`` the --ram that holds all
    experts, and ``smaller`` are flags that would make the weights smaller than they are.
    """

    hit_rate: float
    dense_s: float
    hits_s: float
    misses_s: float
    disk_s: float
    all_ram_bytes: int
    smaller: tuple[str, ...] = ()

    @property
    def compute_s(self) -> float:
        return self.dense_s + self.hits_s + self.misses_s

    @property
    def tokens_per_s(self) -> float:
        return 1 / (self.dense_s + max(self.hits_s, self.disk_s) + self.misses_s)

    @property
    def bottleneck(self) -> str:
        return "disk" if self.disk_s > self.compute_s else "memory"

    def summary(self) -> list[str]:
        smaller = " and ".join(self.smaller)
        if self.bottleneck == "disk":
            weights = f"smaller weights: {smaller}, " if smaller else ""
            advice = (
                f"a larger --ram holds more experts (all of them: --ram {format_size(self.all_ram_bytes)}); {weights}"
                "a smaller --ctx makes room"
            )
        elif smaller:
            advice = f"fewer bytes for the processor to read: {smaller}"
        else:
            advice = "no flag helps: the processor reads these weights as fast as its memory gives them"
        return [
            f"expected on this machine: {self.tokens_per_s:.1f} tokens/s, held back by the {self.bottleneck} (a token: "
            f"compute {1e3 * self.compute_s:.1f} ms, disk {1e3 * self.disk_s:.1f}); {self.hit_rate:.0%} of the experts "
            "found in RAM",
            f"to go faster: {advice}",
        ]

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "smaller"} | {
            "machine": "this machine",
            "compute_s": self.compute_s,
            "tokens_per_s": self.tokens_per_s,
            "bottleneck": self.bottleneck,
        }


def cpu_estimate(
    plan: Plan, accesses: int, hit_rate: float, rates: CpuRates, smaller: tuple[str, ...] = ()
) -> CpuEstimate:
    """Decoding one token at a time, the prompt behind it, the cache warm; a token takes ``accesses`` experts."""
    sizes = plan.sizes
    routed = accesses * sizes.slot_bytes
    return CpuEstimate(
        hit_rate=hit_rate,
        dense_s=sizes.skeleton_bytes / rates.dense,
        hits_s=hit_rate * routed / rates.experts,
        misses_s=(1 - hit_rate) * routed / rates.experts,
        disk_s=(1 - hit_rate) * routed / rates.disk,
        all_ram_bytes=plan.budget + (sizes.num_experts - plan.slots) * sizes.slot_bytes,
        smaller=smaller,
    )
