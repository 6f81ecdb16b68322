"""The screens look as they did: ``python -m tests.tui.snapshots`` takes them anew after a change that was meant."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.tui.snapshots import FOLDER, PICTURES, SCENES, SIZES, libraries, name, take, text_of


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("scene", SCENES)
def test_a_screen_looks_as_before(scene: str, size: tuple[int, int], tmp_path: Path) -> None:
    svg, text = asyncio.run(take(scene, size, tmp_path))
    kept = FOLDER / name(scene, size)
    assert text.splitlines() == kept.with_suffix(".txt").read_text("utf-8").splitlines()
    if scene in PICTURES:
        before = kept.with_suffix(".svg").read_text("utf-8")
        assert text_of(svg) == text_of(before) and text_of(svg)
        if libraries() == (FOLDER / "libraries").read_text("utf-8"):
            assert svg.splitlines() == before.splitlines()
