"""The map of all experts as a grid of cells, for any number of layers and experts: pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from offload.events import CacheSnapshot, ExpertState

RECENT_PASSES = 2
"""For how many forward passes an expert that was used stays lit."""


class Cell(IntEnum):
    """What a cell shows; of the experts that share one, the highest wins."""

    ABSENT = 0
    HOSTED = 1
    RESIDENT = 2
    LOADING = 3
    HIT = 4
    MISSED = 5


GLYPHS = {Cell.ABSENT: "·", Cell.HOSTED: "-", Cell.RESIDENT: "o", Cell.LOADING: ">", Cell.HIT: "#", Cell.MISSED: "x"}
"""For screens without colours."""


@dataclass(frozen=True, slots=True)
class Grid:
    """``cells`` and ``shares`` (of the cell's experts that are resident) are [row][column]. A cell covers
    ``layers_each`` layers and ``experts_each`` experts; the last ones may cover fewer."""

    cells: tuple[tuple[Cell, ...], ...]
    shares: tuple[tuple[float, ...], ...]
    layers_each: int
    experts_each: int


def expert_cell(snapshot: CacheSnapshot, row: int, expert: int) -> Cell:
    """The state of one expert of the ``row``-th layer."""
    state = snapshot.states[row][expert]
    used = snapshot.last_use[row][expert]
    if used >= 0 and snapshot.forward - used < RECENT_PASSES:
        if snapshot.last_miss[row][expert] == used:
            return Cell.MISSED
        if state == ExpertState.READY:
            return Cell.HIT
    if state == ExpertState.LOADING:
        return Cell.LOADING
    kept = {ExpertState.READY: Cell.RESIDENT, ExpertState.HOSTED: Cell.HOSTED}
    return kept.get(ExpertState(state), Cell.ABSENT)


def make_grid(snapshot: CacheSnapshot, rows: int, columns: int) -> Grid:
    """At most ``rows`` x ``columns`` cells for all layers and experts."""
    layers = len(snapshot.layers)
    experts = max((len(states) for states in snapshot.states), default=0)
    layers_each, experts_each = -(-layers // max(1, rows)) or 1, -(-experts // max(1, columns)) or 1
    each = [_layer_cells(snapshot, row, experts) for row in range(layers)]
    cells, shares = [], []
    for top in range(0, layers, layers_each):
        some = range(top, min(top + layers_each, layers))
        if layers_each == experts_each == 1:
            cells.append(tuple(map(_CELLS.__getitem__, each[top])))
            shares.append(tuple(map(float, _padded(snapshot.states[top], experts).translate(_READY))))
            continue
        cell_row, share_row = [], []
        for left in range(0, experts, experts_each):
            part = slice(left, left + experts_each)
            states = b"".join(snapshot.states[row][part] for row in some)
            cell_row.append(_CELLS[max(max(each[row][part]) for row in some)])
            share_row.append(states.count(ExpertState.READY) / len(states) if states else 0.0)
        cells.append(tuple(cell_row))
        shares.append(tuple(share_row))
    return Grid(tuple(cells), tuple(shares), layers_each, experts_each)


_CELLS = tuple(Cell)
_KEPT = {ExpertState.LOADING: Cell.LOADING, ExpertState.READY: Cell.RESIDENT, ExpertState.HOSTED: Cell.HOSTED}
_AS_CELL = bytes(_KEPT.get(state, Cell.ABSENT) for state in [*ExpertState, *range(len(ExpertState), 256)])
_READY = bytes(int(state == ExpertState.READY) for state in range(256))


def _layer_cells(snapshot: CacheSnapshot, row: int, experts: int) -> bytearray:
    """A cell for each of ``experts`` of a layer, in few steps of Python: this is done with every repaint."""
    cells = bytearray(_padded(snapshot.states[row], experts).translate(_AS_CELL))
    oldest = max(-1, snapshot.forward - RECENT_PASSES)
    for expert, used in enumerate(snapshot.last_use[row]):
        if used > oldest:
            cells[expert] = max(cells[expert], expert_cell(snapshot, row, expert))
    return cells


def _padded(states: bytes, experts: int) -> bytes:
    """Layers may have different numbers of experts."""
    return states.ljust(experts, bytes([ExpertState.ABSENT]))


def describe(snapshot: CacheSnapshot, row: int, expert: int, score: float | None = None) -> str:
    """One line about one expert of the ``row``-th layer; ``score`` is the policy's."""
    layer = snapshot.layers[row]
    if expert >= len(snapshot.states[row]):
        return f"layer {layer} has {len(snapshot.states[row])} experts"
    state = ExpertState(snapshot.states[row][expert])
    names = [tier.name for tier in snapshot.tiers] or ["a slot"]
    where = {
        ExpertState.ABSENT: "on disk",
        ExpertState.LOADING: f"on its way to {names[0]}",
        ExpertState.READY: f"in {names[0]}",
        ExpertState.HOSTED: f"in {names[-1]}",
    }
    used = snapshot.last_use[row][expert]
    ago = snapshot.forward - used
    when = (
        "never used" if used < 0 else "used now" if ago == 0 else f"used {ago} {'pass' if ago == 1 else 'passes'} ago"
    )
    hits, misses = snapshot.hits[row][expert], snapshot.misses[row][expert]
    return (
        f"layer {layer} expert {expert} · {where[state]} · score {'-' if score is None else f'{score:.3g}'} · {when} · "
        f"{hits} hits, {misses} misses"
    )
