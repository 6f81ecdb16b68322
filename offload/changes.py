"""Changes to an engine that is loaded, between tokens: what is resident stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

from cache.policies import PolicyError, make_policy
from offload.config import PREFETCHES, EngineSettings
from offload.errors import UsageError
from offload.events import LiveChanges
from offload.model.experts import ExpertRuntime
from offload.model.next_gate import NextGate

_CHANGEABLE = ("policy", "prefetch")


def apply_changes(
    changes: LiveChanges, settings: EngineSettings, runtime: ExpertRuntime, new_predictor: Callable[[], NextGate]
) -> EngineSettings:
    """Apply ``changes`` to ``runtime``; returns the settings that hold from now on.

    A new policy begins with the resident records, in the order of their slots, and without a history. Raises UsageError
    for what cannot be changed or does not exist; nothing is changed then.
    """
    wanted = {field.name: value for field in fields(changes) if (value := getattr(changes, field.name)) is not None}
    for name in wanted:
        if name not in _CHANGEABLE:
            raise UsageError(f"{name} cannot be changed while a model is loaded; give --{name} at the start")
    prefetch = changes.prefetch
    if prefetch is not None and prefetch not in PREFETCHES:
        raise UsageError(f"--prefetch: '{prefetch}' is not one of {', '.join(PREFETCHES)}")
    if changes.policy is not None:
        try:
            policy = make_policy(changes.policy)
        except PolicyError as error:
            raise UsageError(f"--policy: {error}") from error
        for key, _ in runtime.cache.occupancy():
            policy.admit(key)
        runtime.cache.policy = policy
    if prefetch is not None and prefetch != settings.prefetch:
        runtime.predictor = new_predictor() if prefetch == "next-gate" else None
    return replace(settings, **wanted)
