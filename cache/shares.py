"""Scopes: whether the layers share all slots or each has its own part of them."""

from __future__ import annotations

from collections.abc import Iterable

SCOPES = ("layer", "global")


def layer_shares(slots: int, layers: Iterable[int]) -> dict[int, int]:
    """Slots of each layer under the scope ``layer``: as even as can be, the first layers get one more.

    With fewer slots than layers some get none; such a layer borrows one for the time of its event.
    """
    ordered = sorted(set(layers))
    if not ordered:
        raise ValueError("the scope 'layer' needs to know the layers")
    least, rest = divmod(slots, len(ordered))
    return {layer: least + (number < rest) for number, layer in enumerate(ordered)}
