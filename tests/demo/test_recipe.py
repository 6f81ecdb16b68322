from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from offload.demo import DemoBuildError, demo_folder
from offload.demo.recipe import CORRECTED, quantise, read_recipe, validate, write_recipe
from offload.demo.recipe_file import RECIPE_PATH, file_hash
from offload.demo.shape import CarveShape
from tests.demo import tiny


def test_installed_recipe_is_valid_small_and_sparse(tmp_path: Path) -> None:
    recipe = read_recipe(RECIPE_PATH)
    assert RECIPE_PATH.stat().st_size <= 10_000_000
    assert recipe.shape.active_share < 0.7
    assert recipe.shape.experts == 32 and recipe.shape.top_k < 16
    assert file_hash(RECIPE_PATH)[:12] in demo_folder(tmp_path).name


def test_round_trip(tmp_path: Path) -> None:
    recipe = tiny.recipe(tiny.dense(), top_k=2, strength=0.1, router=0.1)
    write_recipe(recipe, tmp_path / "r.safetensors")
    back = read_recipe(tmp_path / "r.safetensors")
    assert back.shape == recipe.shape and back.source == {"model": "tiny"}
    assert all(torch.equal(back.tensors[key], value) for key, value in recipe.tensors.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.safetensors"]


def test_correction_survives_eight_bits() -> None:
    params = tiny.params(tiny.dense(), strength=0.1, router=0.0)
    recipe = tiny.recipe(tiny.dense(), top_k=2, strength=0.1)
    for name in CORRECTED:
        exact = params[1][name + "_b"] @ params[1][name + "_a"]
        assert (recipe.correction(1, name) - exact).norm() < 0.02 * exact.norm()


def test_quantise_keeps_zero_and_extremes() -> None:
    values = torch.tensor([[0.0, 2.54], [-1.27, 0.5]])
    whole, unit = quantise(values, 0)
    assert whole[0].tolist() == [0, 127] and whole[1, 0] == -127
    assert unit.tolist() == pytest.approx([0.02, 0.01])


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    recipe = tiny.recipe(tiny.dense(), top_k=2)
    with pytest.raises(DemoBuildError, match="cannot be read"):
        read_recipe(path)
    write_recipe(recipe, path)
    whole = path.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DemoBuildError):
            read_recipe(path)
    save_file(recipe.tensors, str(path), {"recipe": json.dumps({"format": "something else"})})
    with pytest.raises(DemoBuildError, match="not a demo recipe"):
        read_recipe(path)
    write_recipe(recipe, path)
    path.write_bytes(path.read_bytes().replace(b"top_k", b"top_q"))
    with pytest.raises(DemoBuildError, match="damaged"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("key", "change", "why"),
    [
        ("router", lambda t: torch.full_like(t, float("nan")), "not finite"),
        ("order", lambda t: torch.zeros_like(t), "permutation"),
        ("scale", lambda t: t[:, :-1], "scale"),
        ("down_a", lambda t: t[:, :, :-1], "down_a"),
        ("gate_up_b", lambda t: t.float(), "gate_up_b"),
        ("o_b_unit", None, "o_b_unit"),
        ("norm1", None, "norm1"),
    ],
)
def test_wrong_tensors_are_refused(key: str, change: object, why: str) -> None:
    recipe = tiny.recipe(tiny.dense(), top_k=2)
    if callable(change):
        recipe.tensors[key] = change(recipe.tensors[key])
    else:
        del recipe.tensors[key]
    with pytest.raises(DemoBuildError, match=why):
        validate(recipe, "recipe")


def test_shapes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="not the layer's 1536"):
        CarveShape(30, 576, 1536, 512, 32, 24, 8)
    with pytest.raises(ValueError, match="more than"):
        CarveShape(30, 576, 1536, 512, 32, 32, 33)
