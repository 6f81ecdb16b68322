"""Scopes: whether the layers share all slots or each has its own part of them."""

from __future__ import annotations

from collections.abc import Iterable

SCOPES = ("layer", "global")
_MOST_PASSING = 8


def layer_shares(slots: int, layers: Iterable[int]) -> dict[int, int]:
    """Slots of each layer under the scope ``layer``: as even as can be, the first layers get one more.

    With fewer slots than layers some get none; such a layer borrows one for the time of its event.
    """
    ordered = sorted(set(layers))
    if not ordered:
        raise ValueError("the scope 'layer' needs to know the layers")
    least, rest = divmod(slots, len(ordered))
    return {layer: least + (number < rest) for number, layer in enumerate(ordered)}


def even_share(slots: int, layers: int) -> int:
    """The most that an even share of the slots has: the ``fill`` of a cache."""
    return -(-slots // max(1, layers))


def passing_slots(slots: int, records: int | None = None) -> int:
    """Slots at the cold end, through which a pass of many tokens streams, of a cache for ``records`` experts.

    A pass may drop as many of the records that it found before it uses them. So there are at most 8, enough to read
    some while others are computed, and at most one for 25 of the records that have no slot: a pass that takes all
    experts reads 4 % more than it must, and less with more of them. Two at least: one is read while another is
    computed.
    """
    most = min(_MOST_PASSING, slots // 8)
    if records is not None:
        most = min(most, max(2, (records - slots) // 25))
    return max(1, most)
