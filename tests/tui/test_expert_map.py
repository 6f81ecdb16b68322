"""The grid of all experts, for any size."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from offload.events import ExpertState, TierUse
from tests.tui.live_engine import snapshot
from tui.app.map_box import fold
from tui.expert_map import Cell, describe, expert_cell, make_grid


def test_each_expert_has_its_cell_where_there_is_room() -> None:
    grid = make_grid(snapshot(2, 4), 10, 10)
    assert grid.cells == (
        (Cell.HIT, Cell.MISSED, Cell.RESIDENT, Cell.ABSENT),
        (Cell.ABSENT, Cell.MISSED, Cell.ABSENT, Cell.RESIDENT),
    )
    assert (grid.layers_each, grid.experts_each) == (1, 1)


def test_what_is_loading_is_seen() -> None:
    made = snapshot(1, 4)
    loading = replace(made, states=(bytes([0, 0, ExpertState.LOADING, 0]),))
    assert make_grid(loading, 1, 4).cells[0][2] is Cell.LOADING


def test_a_use_fades() -> None:
    assert make_grid(replace(snapshot(1, 4), forward=12), 1, 4).cells[0][:2] == (Cell.RESIDENT, Cell.ABSENT)


@given(st.integers(1, 130), st.integers(1, 130), st.integers(1, 60), st.integers(1, 80))
def test_any_size_fits_and_covers_every_expert(layers: int, experts: int, rows: int, columns: int) -> None:
    made = snapshot(layers, max(2, experts))
    grid = make_grid(made, rows, columns)
    assert len(grid.cells) <= rows and len(grid.cells[0]) <= columns
    assert len(grid.cells) * grid.layers_each >= layers
    assert len(grid.cells[0]) * grid.experts_each >= experts
    ready = sum(states.count(ExpertState.READY) for states in made.states)
    covered = 0.0
    for y, shares in enumerate(grid.shares):
        height = min(grid.layers_each, layers - y * grid.layers_each)
        for x, share in enumerate(shares):
            width = min(grid.experts_each, max(2, experts) - x * grid.experts_each)
            covered += share * height * width
    assert round(covered) == ready


def test_layers_of_different_size() -> None:
    made = snapshot(2, 4)
    uneven = replace(made, states=(made.states[0], b""), last_use=(made.last_use[0], []))
    grid = make_grid(uneven, 5, 5)
    assert grid.cells[1] == (Cell.ABSENT,) * 4
    assert describe(uneven, 1, 3) == "layer 1 has 0 experts"


def test_details() -> None:
    made = replace(snapshot(1, 4), forward=10)
    used = "layer 0 expert 0 · in RAM · score 1.23e+03 · used 1 pass ago · 5 hits, 0 misses"
    assert describe(made, 0, 0, 1234.0) == used
    assert describe(made, 0, 3) == "layer 0 expert 3 · on disk · score - · never used · 0 hits, 0 misses"


def test_two_tiers_are_told_apart() -> None:
    tiers = (TierUse("VRAM", 1, 2, 0), TierUse("RAM", 1, 1, 0))
    states = bytes([ExpertState.ABSENT, ExpertState.HOSTED, ExpertState.LOADING, ExpertState.READY])
    made = replace(snapshot(1, 4), forward=99, states=(states,), tiers=tiers)
    cells = (Cell.ABSENT, Cell.HOSTED, Cell.LOADING, Cell.RESIDENT)
    assert make_grid(made, 1, 4).cells == (cells,)
    assert make_grid(made, 1, 2).cells == ((Cell.HOSTED, Cell.LOADING),)
    assert [expert_cell(made, 0, expert) for expert in range(4)] == list(cells)
    where = [describe(made, 0, expert).split(" · ")[1] for expert in range(4)]
    assert where == ["on disk", "in RAM", "on its way to VRAM", "in VRAM"]


def test_details_are_folded_where_their_parts_end() -> None:
    text = describe(snapshot(1, 4), 0, 0)
    assert fold(text, 200) == [text]
    assert fold(text, 38) == ["layer 0 expert 0 · in RAM · score -", "used now · 5 hits, 0 misses"]
    assert fold("", 10) == [""]
