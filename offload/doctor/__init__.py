"""Looks at what this machine can do and at what is wrong with it: ``run-local doctor``.

Each module looks at one thing and returns findings. A look never raises, never uses the network, and leaves nothing
behind but the compiled kernels that a first chat would make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from offload.events import Finding


def examine() -> Iterator[Finding]:
    """One finding after the other. The first ones come before torch is imported."""
    from offload.doctor.software import packages

    broken = False
    for finding in _guarded("packages", packages):
        broken = broken or finding.state == "problem"
        yield finding
    if broken:  # the rest would fail for the same reason
        return

    from offload.doctor.card import card
    from offload.doctor.processor import memory, processor
    from offload.doctor.storage import storage

    for area, look in (("processor", processor), ("memory", memory), ("card", card), ("storage", storage)):
        yield from _guarded(area, look)


def _guarded(area: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """What ``look`` finds; that it fails is a finding, too."""
    try:
        return look()
    except Exception as error:
        return [Finding(area, "problem", f"looking at it failed: {type(error).__name__}: {error}")]
