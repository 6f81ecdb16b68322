"""The map of all experts as a grid of cells, for any number of layers and experts: pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
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
    lit = [_lit(snapshot, row) for row in range(layers)]
    cells, shares = [], []
    for top in range(0, layers, layers_each):
        some = range(top, min(top + layers_each, layers))
        cell_row, share_row = [], []
        for left in range(0, experts, experts_each):
            part = slice(left, left + experts_each)
            states = b"".join(snapshot.states[row][part] for row in some)
            ready = states.count(ExpertState.READY)
            best = max((lit[row].get(e, 0) for row in some for e in _used(lit[row], left, experts_each)), default=0)
            best = max(best, Cell.LOADING if ExpertState.LOADING in states else 0, Cell.RESIDENT if ready else 0)
            best = best or (Cell.HOSTED if ExpertState.HOSTED in states else 0)
            cell_row.append(Cell(best))
            share_row.append(ready / len(states) if states else 0.0)
        cells.append(tuple(cell_row))
        shares.append(tuple(share_row))
    return Grid(tuple(cells), tuple(shares), layers_each, experts_each)


def _lit(snapshot: CacheSnapshot, row: int) -> dict[int, int]:
    """The experts of a layer that the latest passes used, with HIT or MISSED: few of many."""
    oldest = snapshot.forward - RECENT_PASSES
    uses: Sequence[int] = snapshot.last_use[row]
    lit = {}
    for expert, used in enumerate(uses):
        if used > oldest and used >= 0:
            cell = expert_cell(snapshot, row, expert)
            if cell > Cell.LOADING:
                lit[expert] = int(cell)
    return lit


def _used(lit: dict[int, int], left: int, count: int) -> list[int]:
    return [expert for expert in lit if left <= expert < left + count]


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
