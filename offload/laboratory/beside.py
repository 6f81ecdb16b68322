"""Tuning while a model is loaded: from the routing of a talk to a change of the running engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cache.trace import Trace
from offload.events import LiveChanges, LoadProgress
from offload.laboratory.tuning import tune_beside
from offload.protocol import TuneReport


@dataclass(frozen=True, slots=True)
class BesideTuning:
    """A :class:`offload.protocol.TuneJob` for an engine with ``slots`` slots, whose policy and scope others are held
    against."""

    trace: Trace
    slots: int
    policy: str
    scope: str

    def __call__(self, on_event: Callable[[LoadProgress], None]) -> TuneReport:
        """See :class:`offload.protocol.TuneJob`."""
        tuned = tune_beside(self.trace, self.slots, (self.policy, self.scope), on_event)
        best = tuned.result.at(tuned.slots).best.candidate
        changes = LiveChanges(
            policy=None if best.policy == self.policy else best.policy,
            scope=None if best.scope == self.scope else best.scope,
        )
        return TuneReport(tuned.to_json(), changes, tuple(tuned.flags), tuned.notes)
