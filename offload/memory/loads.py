"""How records reach the slots of a device: what the runtime asks for a load."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from cache.host_tier import HostCounters
from cache.keys import ExpertKey
from offload.devices.base import SlotArena
from offload.memory.lanes import DiskLane


class LoadTicket(Protocol):
    """One load on its way; :class:`offload.memory.lanes.Ticket` says what the methods do. For the engine thread."""

    key: ExpertKey
    size: int
    """Bytes that came from disk, once it is done."""

    def ready(self) -> bool: ...

    def wait(self) -> tuple[int, float]: ...

    def promote(self) -> None: ...

    def drop(self) -> bool: ...

    def settle(self) -> bool: ...


@dataclass(slots=True)
class LinkCounters:
    """Bytes over the link in each direction; seconds that compute waited for it."""

    host_to_device: int = 0
    device_to_host: int = 0


class Loads(ABC):
    """Starts loads into slots. All methods are for the engine thread.

    ``host`` counts the tier below the slots and ``link`` the copies, both None where slots are host memory.
    ``keeps_order``: the device computes on its own, so :meth:`computed` must be told what it reads.
    """

    keeps_order: bool = False
    host: HostCounters | None = None
    link: LinkCounters | None = None

    def lies_in_ram(self, key: ExpertKey) -> bool:
        """Whether the record of ``key`` is whole in host memory below the slots."""
        return False

    def lend(self, key: ExpertKey) -> torch.Tensor:
        """Such a record, uint8[>= its bytes], for the CPU to read. It stays there until :meth:`give_back`."""
        raise NotImplementedError("there is no memory below the slots")

    def give_back(self, key: ExpertKey) -> None:  # noqa: B027 - only what was lent is given back
        """The CPU is done with a record that was lent."""

    @abstractmethod
    def load(self, key: ExpertKey, slot: int, *, victim: ExpertKey | None = None, prefetch: bool = False) -> LoadTicket:
        """Start bringing ``key`` into ``slot``, where ``victim`` was, if anything was; the victim's record is lost.

        Raises RuntimeError if the system gives no thread for it, or the loads are closed.
        """

    def event(self, keys: Sequence[ExpertKey], lacking: Sequence[ExpertKey]) -> None:  # noqa: B027 - only a tier below the slots wants to know
        """An event selects ``keys``; the device has no record of those in ``lacking``, or is still getting it."""

    def computed(self, slots: Sequence[int]) -> None:  # noqa: B027 - nothing runs beside the engine thread on the CPU
        """Kernels that read these slots were launched."""

    def quiesce(self, slots: Sequence[int]) -> None:  # noqa: B027 - as above
        """Wait until nothing reads these slots any more: their memory is about to go."""

    def stall_link_seconds(self) -> float | None:
        """Time so far that kernels waited for copies; None where there are none."""
        return None

    @abstractmethod
    def busy_seconds(self) -> float:
        """Time so far during which at least one read was running."""

    @abstractmethod
    def close(self) -> None:
        """Stop: loads that have not started are dropped, running ones are waited for."""


class DirectLoads(Loads):
    """Disk -> slot, where slots are host memory."""

    def __init__(self, lane: DiskLane, arena: SlotArena) -> None:
        self.lane = lane
        self._arena = arena

    def load(self, key: ExpertKey, slot: int, *, victim: ExpertKey | None = None, prefetch: bool = False) -> LoadTicket:
        return self.lane.load(key, self._arena.buffer(slot), prefetch=prefetch)

    def busy_seconds(self) -> float:
        return self.lane.busy_seconds()

    def close(self) -> None:
        self.lane.close()
