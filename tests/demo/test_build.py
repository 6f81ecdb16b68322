from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offload.demo import DemoBuildError
from offload.demo.build import fold, write_checkpoint
from offload.demo.distil.dense import dense_transformers_model
from offload.demo.distil.student import Carved
from offload.demo.gguf_dense import DenseModel, unpermute
from offload.demo.recipe import Recipe
from tests.demo import tiny

IDS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(3))


def load(model: DenseModel, recipe: Recipe, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    write_checkpoint(fold(model, recipe), model.config, recipe.shape, folder)
    loaded, info = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded).__name__ == "Qwen2MoeForCausalLM"
    return loaded.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits.float()


def test_all_experts_and_no_corrections_are_the_dense_model(tmp_path: Path) -> None:
    model = tiny.dense()
    carved = load(model, tiny.recipe(model, top_k=4), tmp_path)
    dense = dense_transformers_model(model).float()
    torch.testing.assert_close(logits(carved), logits(dense), atol=2e-4, rtol=2e-4)


def test_fewer_experts_are_another_model(tmp_path: Path) -> None:
    model = tiny.dense()
    carved = load(model, tiny.recipe(model, top_k=1, router=0.05), tmp_path)
    assert (logits(carved) - logits(dense_transformers_model(model).float())).abs().max() > 0.05


def test_what_was_trained_is_what_is_shipped(tmp_path: Path) -> None:
    model = tiny.dense()
    recipe = tiny.recipe(model, top_k=2, strength=0.05, router=0.5)
    params = tiny.params(model, strength=0.05, router=0.5)
    student = Carved(model, recipe.shape, tiny.order(), IDS.shape[1])
    with torch.no_grad():
        hidden = student.head_input(student.forward(IDS, params))
        trained = (hidden @ model.tensors["model.embed_tokens.weight"].T).float()
    shipped = logits(load(model, recipe, tmp_path))
    # bf16 arithmetic and 8-bit factors on one side; a wrong factor or order would be off by the logits' own size
    assert (trained - shipped).pow(2).mean().sqrt() < 0.08 * shipped.std()


def test_recipe_for_another_model_is_refused() -> None:
    model = tiny.dense()
    recipe = tiny.recipe(model, top_k=2)
    other = DenseModel(tiny.DenseConfig(**(vars(model.config) | {"layers": 3})), model.tensors)
    with pytest.raises(DemoBuildError, match="recipe is for 2 layers"):
        fold(other, recipe)


def test_unpermute_undoes_the_converter() -> None:
    weight = torch.randn(24, 5)
    converted = weight.reshape(3, 2, 4, 5).swapaxes(1, 2).reshape(24, 5)  # llama.cpp's LlamaModel.permute, 3 heads
    assert torch.equal(torch.from_numpy(unpermute(converted.numpy(), 3).copy()), weight)
