"""How slots are cut into segments that are allocated and given back as a whole."""

from __future__ import annotations

from collections.abc import Sequence

SEGMENT_BYTES = 64 * 2**20
"""About the size of a segment: small enough to shrink by, large enough that the allocator's rounding is nothing."""


def segment_slots(slots: int, slot_bytes: int, segment_bytes: int = SEGMENT_BYTES) -> int:
    """Slots of one segment: as many as fit, but enough segments that a small arena can shrink, too."""
    return max(1, min(segment_bytes // slot_bytes, -(-slots // 32)))


def segments_of(slots: Sequence[int], size: int, total: int) -> list[int]:
    """The segments that ``slots`` fill. Raises ValueError if one of them is not filled."""
    wanted = set(slots)
    found = sorted({slot // size for slot in wanted})
    for segment in found:
        if not wanted.issuperset(range(segment * size, min(total, (segment + 1) * size))):
            raise ValueError(f"segment {segment} is given back or taken as a whole")
    return found
