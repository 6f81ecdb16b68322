"""Models in Mistral's own layout give the logits of their twins in transformers', read where they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offload.checkpoint.source import open_source
from offload.config import EngineSettings
from offload.errors import ModelError
from offload.events import Notice
from offload.opening import plan_only
from tests.engines import open_tiny
from tests.families import CONFIGS
from tests.mistral_models import build_mistral, params_of
from tests.model.test_bit_exact import DECODE_IDS, IDS, SMALLEST, assert_equal, logits
from tests.tiny_models import reference_logits


@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("scales", [None, "tensor", "block", "16"])
def test_logits_are_those_of_the_twin(scales: str | None, device: str, tmp_path: Path) -> None:
    pair = build_mistral(tmp_path, scales)
    settings = {"residency": SMALLEST if device == "cpu" else 0.5, "kernels": "torch"}
    with open_tiny(pair.published, tmp_path / "packs", device=device, **settings) as engine:
        assert_equal(
            [step.cpu() for step in logits(engine)], reference_logits(pair.reference, IDS, DECODE_IDS, whole=True)
        )


@pytest.mark.parametrize("name", ["layers.1.experts.3.w3.weight", "layers.0.attention.wq_b.weight"])
def test_one_turned_weight_shows(name: str, tmp_path: Path) -> None:
    pair = build_mistral(tmp_path)
    expected = reference_logits(pair.reference, IDS, DECODE_IDS, whole=True)
    for file in pair.published.glob("consolidated*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            save_file(tensors | {name: -tensors[name]}, file)
    with open_tiny(pair.published, tmp_path / "packs") as engine:
        assert not all(torch.equal(one, other) for one, other in zip(logits(engine), expected, strict=True))


def test_plan_and_what_is_left_out(tmp_path: Path) -> None:
    pair = build_mistral(tmp_path, "tensor")
    said: list[str] = []
    told = plan_only(
        EngineSettings(model=str(pair.published), context_tokens=64),
        lambda event: said.append(event.text) if isinstance(event, Notice) else None,
    )
    assert any("its vision part is left out" in line for line in said)
    assert any("is quantised (fp8)" in line for line in said)
    twin = plan_only(EngineSettings(model=str(pair.reference), context_tokens=64), lambda event: None)
    assert told.weights == twin.weights
    for file in pair.published.glob("consolidated*"):
        file.unlink()
    assert plan_only(EngineSettings(model=str(pair.published), context_tokens=64), lambda event: None).weights == (
        told.weights
    )


def test_the_magnitude_is_corrected_only_where_the_file_says_so(tmp_path: Path) -> None:
    own = build_mistral(tmp_path).published
    source = open_source(own)
    assert source.config.rope_parameters["attention_factor"] == 1
    assert source.model.model.layers[0].self_attn.scaling == 24**-0.5
    change(own, yarn=json.loads((own / "params.json").read_text())["yarn"] | {"apply_scale": True})
    changed = open_source(own)
    assert changed.model.model.layers[0].self_attn.scaling > 24**-0.5
    source.close()
    changed.close()


def test_transformers_layout_is_taken_where_both_are(tmp_path: Path) -> None:
    pair = build_mistral(tmp_path)
    for file in (*pair.published.glob("consolidated*"), pair.published / "params.json"):
        file.rename(pair.reference / file.name)
    source = open_source(pair.reference)
    assert {file.name for file in source.files.values()} == {"model.safetensors"}
    source.close()


def test_the_published_sizes_are_planned(tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "mistral-large-3" / "config.json").read_text())
    quantisation = config["quantization_config"]
    params = params_of({"routed_scaling_factor": 1.0} | config) | {"quantization": quantisation}
    (tmp_path / "params.json").write_text(json.dumps(params))
    told = plan_only(EngineSettings(model=str(tmp_path), context_tokens=64, ram=4 * 2**40), lambda event: None)
    twin = CONFIGS / "mistral-large-3"
    same = plan_only(EngineSettings(model=str(twin), context_tokens=64, ram=4 * 2**40), lambda event: None)
    assert told.weights == same.weights and told.weights.total == pytest.approx(673e9, rel=0.01)
    assert told.plan.sizes.slot_bytes == same.plan.sizes.slot_bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": None}, r"a model without experts is not read .* transformers' layout, with config.json"),
        ({"qk_nope_head_dim": None}, r"without latent attention, such as Mixtral, is not read in Mistral's own layout"),
        ({"sliding_window": 64}, r"asks for more than transformers' mistral4 does"),
        ({"quantization": {"qformat_weight": "int3"}}, r"its quantisation \(int3\) is not supported; fp8_e4m3 is"),
        ({"quantization": {"quant_method": "COMPRESSED_TENSORS", "format": "int-quantized"}}, "int-quantized"),
        ({"yarn": None}, r"params.json is damaged"),
        ({"dim": None}, r"params.json is damaged"),
    ],
)
def test_what_cannot_be_read_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    own = build_mistral(tmp_path).published
    change(own, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        open_source(own)
    assert "\n" not in str(caught.value)


def change(folder: Path, **changes: Any) -> None:
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | changes))
