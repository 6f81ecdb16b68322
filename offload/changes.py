"""Changes to an engine that is loaded, between tokens: what is resident stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

from cache.cache_log import CacheSetup, LoggedCache
from cache.policies import PolicyError
from offload.config import EngineSettings
from offload.errors import UsageError
from offload.events import LiveChanges
from offload.host_side import NO_HOST_TIER, NOTHING_TO_CHOOSE
from offload.memory.storage import make_host_policy
from offload.memory.tiers import TieredLoads
from offload.model.experts import ExpertRuntime
from offload.model.host_experts import HostExperts
from offload.model.prefetch import Prefetcher
from offload.model.transformers_api import ExpertsModule

_CHANGEABLE = ("policy", "scope", "prefetch", "miss", "host_policy")


def apply_changes(
    changes: LiveChanges,
    settings: EngineSettings,
    runtime: ExpertRuntime,
    modules: Sequence[ExpertsModule],
    make_prefetcher: Callable[[str], Prefetcher | None],
    make_host_experts: Callable[[str], HostExperts | None] | None,
) -> EngineSettings:
    """Apply ``changes`` to ``runtime``; returns the settings that hold from now on.

    A new policy or scope begins with the resident records, the coldest first, and without a history.
    ``make_host_experts`` is None where misses have one way only. Raises UsageError for what cannot be changed or does
    not exist; nothing is changed then.
    """
    wanted = {field.name: value for field in fields(changes) if (value := getattr(changes, field.name)) is not None}
    for name in wanted:
        if name not in _CHANGEABLE:
            raise UsageError(f"{name} cannot be changed while a model is loaded; give --{name} at the start")
    changed = replace(settings, **wanted)
    if changes.miss is not None and make_host_experts is None:
        raise UsageError(f"--miss {changes.miss}: {NOTHING_TO_CHOOSE}")
    tiers = runtime.loads if isinstance(runtime.loads, TieredLoads) else None
    host_policy = None
    if changes.host_policy is not None:
        if tiers is None:
            raise UsageError(f"--host-policy {changes.host_policy}: {NO_HOST_TIER}")
        if changed.host_policy != settings.host_policy:
            most = max(module.num_experts for module in modules)
            host_policy = make_host_policy(changed.host_policy, len(modules), most)
    if (changed.policy, changed.scope) != (settings.policy, settings.scope):
        layers = tuple(module.layer for module in modules)
        experts = max(module.num_experts for module in modules)
        cache = runtime.cache
        setup = CacheSetup(changed.policy, changed.scope, cache.slots, layers, experts, changed.seed or 0)
        try:
            if isinstance(cache, LoggedCache):
                cache.change_setup(setup)
            else:
                cache.change_policy(setup.make_policy(), setup.shared_layers())
        except PolicyError as error:
            raise UsageError(f"--policy: {error}") from error
    if host_policy is not None and tiers is not None:
        tiers.tier.change_policy(host_policy)
    if changed.prefetch != settings.prefetch:
        runtime.predictor = make_prefetcher(changed.prefetch)
    elif runtime.predictor is not None:
        runtime.predictor.setting_changed()
    if changed.miss != settings.miss and make_host_experts is not None:
        runtime.host_experts = make_host_experts(changed.miss)
    return changed
