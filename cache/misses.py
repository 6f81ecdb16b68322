"""Where an event's misses are computed: on the device, which must copy them first, or on the CPU, where they lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from cache.keys import ExpertKey
from cache.machines import Machine
from cache.policies.ewma import EWMA

HALF_LIFE = 16.0
"""Events of a layer after which a use counts half, where it is asked whether a copy will be repaid."""

SHARED = 0.25
"""Part of the time in which the CPU computes with experts: then a copy is in its way. It is a fifth to a third where a
quarter or an eighth of Qwen3-30B-A3B's experts have slots (docs/devices.md)."""
MOST_ADMITTED = 4
"""Copies under way of records that the CPU computed with: about what the link can do before it is wanted again."""


@dataclass(frozen=True, slots=True)
class MissRates:
    """What the choice goes by: bytes or floating point operations a second, and seconds.

    ``load_s`` is what starting a copy costs, ``event_s`` what a group of experts costs on the device beside its bytes.
    """

    link_bytes_per_s: float
    device_bytes_per_s: float
    device_flops_per_s: float
    host_bytes_per_s: float
    host_flops_per_s: float
    load_s: float
    event_s: float

    @classmethod
    def of_machine(cls, machine: Machine) -> MissRates:
        return cls(
            machine.link_bytes_per_s,
            machine.expert_bytes_per_s,
            machine.flops_per_s,
            machine.host_bytes_per_s,
            machine.host_flops_per_s,
            machine.load_s,
            machine.event_s,
        )


@dataclass(frozen=True, slots=True)
class ExpertWork:
    """One expert of a layer: bytes of its record, operations for each of its tokens, and the bytes that a token's
    hidden state (``input_bytes``) and an expert's product of it (``output_bytes``) take."""

    record_bytes: int
    flops: float
    input_bytes: int = 0
    output_bytes: int = 0


class MissPlanner:
    """Splits the misses of each event between device and CPU, and says which of the CPU's to copy all the same.

    The split is that of the shortest makespan: the CPU's lane against those of link and device, whose hits go first.
    Experts with many tokens go over the link and those with few to the CPU, since the CPU's time grows with the tokens
    and the copy's does not; of equals those go over the link that were used most of late. This is the order of the
    greedy schedule of HybriMoE (Zhong et al., "HybriMoE: hybrid CPU-GPU scheduling and cache management for efficient
    MoE inference", arXiv 2504.05897, 2025); DALI (arXiv 2602.03495, 2026) assigns greedily by the same two times. There
    each expert goes to the lane that is done with it first. Here every cut of the order is tried, which costs no more.

    A record that the CPU computed with is copied, in idle time, if that repays (:meth:`repays`).
    """

    def __init__(self, rates: MissRates, strategy: str = "auto") -> None:
        self.rates = rates
        self.strategy = strategy
        self._recent = EWMA(half_life=HALF_LIFE)  # as a board of scores: it holds nothing

    def record_event(self, keys: Sequence[ExpertKey]) -> None:
        """One event, hits and misses alike."""
        self._recent.update_scores(keys)

    def hottest_first(self, keys: Iterable[ExpertKey]) -> list[ExpertKey]:
        return sorted(keys, key=self._recent.uses, reverse=True)

    def device_s(self, work: ExpertWork, tokens: float = 1) -> float:
        return max(
            work.record_bytes / self.rates.device_bytes_per_s, tokens * work.flops / self.rates.device_flops_per_s
        )

    def host_s(self, work: ExpertWork, tokens: float = 1) -> float:
        return max(work.record_bytes / self.rates.host_bytes_per_s, tokens * work.flops / self.rates.host_flops_per_s)

    def copy_s(self, work: ExpertWork) -> float:
        return self.rates.load_s + work.record_bytes / self.rates.link_bytes_per_s

    def on_cpu(
        self,
        misses: Sequence[ExpertKey],
        tokens: Mapping[int, int],
        work: ExpertWork,
        *,
        hits: Iterable[ExpertKey] = (),
        loading: int = 0,
        event_tokens: int = 1,
    ) -> list[ExpertKey]:
        """Which of ``misses``, all of them in RAM, the CPU computes.

        ``tokens`` are those of each expert of the event, by its number, and ``event_tokens`` those of the event;
        ``hits`` are what the device computes in any case, and ``loading`` how many records the link brings it anyway.
        """
        if self.strategy == "fetch" or not misses:
            return []
        if self.strategy == "cpu":
            return list(misses)
        order = sorted(self.hottest_first(misses), key=lambda key: -tokens[key.expert])
        rows = [tokens[key.expert] for key in order]
        on_device = [self.device_s(work, count) for count in rows]
        handed = [self.host_s(work, count) + count * work.output_bytes / self.rates.link_bytes_per_s for count in rows]
        left = [*accumulate(reversed(handed), initial=0.0)][::-1]  # what the CPU has to do beyond each cut
        handover = 2 * self.rates.load_s + event_tokens * work.input_bytes / self.rates.link_bytes_per_s
        shared = self.rates.link_bytes_per_s / self.rates.host_bytes_per_s  # both lanes read the same memory
        link = loading * self.copy_s(work)
        device = self.rates.event_s + sum(self.device_s(work, tokens[key.expert]) for key in hits)
        best, shortest = 0, float("inf")
        for cut in range(len(order) + 1):
            cpu = handover + left[cut] if cut < len(order) else 0.0
            cpu += shared * min(cpu, link)
            if (makespan := max(cpu, device)) < shortest * (1 - 1e-9):
                best, shortest = cut, makespan
            if cut < len(order):
                link += self.copy_s(work)
                device = max(device, link) + on_device[cut] + (0.0 if cut else self.rates.event_s)
        return order[best:]

    def repays(self, work: ExpertWork, key: ExpertKey, victim: ExpertKey) -> bool:
        """Whether to copy ``key``, which the CPU has just computed with, in place of ``victim``.

        The link has nothing else to do, but the copy reads the record from RAM once, which keeps the CPU from it as
        long as computing does, for the :data:`SHARED` part of it. What it brings is the time between CPU and device,
        for each use by which ``key`` is expected to surpass ``victim``: both are taken to be used as much as they were
        of late (a count that halves every :data:`HALF_LIFE` events of the layer).
        """
        more = self._recent.uses(key) - self._recent.uses(victim)
        price = SHARED * work.record_bytes / self.rates.host_bytes_per_s
        return more * (self.host_s(work) - self.device_s(work)) >= price
