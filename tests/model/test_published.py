"""Quantised checkpoints as they are published: a model gives bit for bit what the stock model gives with the weights
that the reference dequantisation gives, at any cache size, and the record of an expert holds the published bytes.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from offload.checkpoint.dense_file import ensure_dense
from offload.checkpoint.formats.methods import parse_layout
from offload.checkpoint.library import ensure_pack
from offload.checkpoint.manifest import EXPERT_FILE_NAME, Manifest
from offload.checkpoint.source import open_source
from offload.config import EngineSettings, SamplingSettings
from offload.errors import ExpertFileError
from offload.events import LoadProgress, Notice
from offload.opening import plan_only
from tests.checkpoint.packs import ignore, resumed_layers, stopped_pack, write_pack
from tests.engines import finish, open_tiny
from tests.model.test_bit_exact import ALL, DECODE_IDS, HALF, IDS, SMALLEST, assert_equal, logits
from tests.published_models import FORMATS, Pair, build_published
from tests.tiny_models import reference_logits


class Tiny(NamedTuple):
    """A checkpoint of one format, the stock model's logits with its weights dequantised, and a folder for packs."""

    pair: Pair
    reference: list[torch.Tensor]
    packs: Path


@pytest.fixture(scope="module", params=FORMATS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """To be read only, but for packs."""
    pair = build_published(request.param, tmp_path_factory.mktemp("published"))
    return Tiny(pair, reference_logits(pair.reference, IDS, DECODE_IDS), pair.published.with_name("packs"))


@pytest.mark.parametrize("residency", [SMALLEST, HALF, ALL])
def test_logits_equal_stock_with_dequantised_weights(tiny: Tiny, residency: float) -> None:
    settings = {"residency": residency, "verify": residency == ALL, "kernels": "torch"}
    with open_tiny(tiny.pair.published, tiny.packs, **settings) as engine:
        assert_equal(logits(engine), tiny.reference)
        engine._runtime.cache.check_integrity()
        if residency == HALF:
            engine.reset()
            sampling = SamplingSettings(temperature=0, max_new_tokens=3)
            assert finish(engine.generate("the expert that", sampling))[1].reason in ("length", "stop")


def test_products_of_packed_weights_are_the_same_at_any_residency(tiny: Tiny) -> None:
    """With the kernels, which round in another way than the library; how far off, ``test_matrix`` sees in float32."""
    found = []
    for residency in (SMALLEST, HALF, ALL):
        with open_tiny(tiny.pair.published, tiny.packs, residency=residency) as engine:
            found.append(logits(engine))
    assert_equal(found[0], found[1])
    assert_equal(found[0], found[2])


def test_other_formats_are_packed_from_the_decoded_weights(tiny: Tiny, tmp_path: Path) -> None:
    """Experts and all else give the same files as those of the unquantised checkpoint."""
    manifests, dense = [], []
    for folder in tiny.pair:
        source = open_source(folder)
        manifest, data = write_pack(source, tmp_path / folder.name, format_name="int8")
        manifests.append((manifest.layouts, manifest.layers, manifest.checksums, data))
        file = ensure_dense(source, tmp_path / folder.name, "tiny", "int4", ignore)
        assert file is not None
        dense.append([file.read(matrix, lambda size: None) for matrix in file.matrices])
        file.close()
    assert manifests[0] == manifests[1]
    for mine, theirs in zip(*dense, strict=True):
        assert torch.equal(mine.codes, theirs.codes) and torch.equal(mine.params, theirs.params)


def test_record_holds_the_published_bytes(tiny: Tiny) -> None:
    source = open_source(tiny.pair.published)
    folder = ensure_pack(source, "published", None, "native", tiny.packs, ignore)
    manifest, data = Manifest.read(folder), (folder / EXPERT_FILE_NAME).read_bytes()
    published = load_file(tiny.pair.published / "model.safetensors")
    experts = {key for found in source.expert_sources.values() for keys in found.keys.values() for key in keys}
    found = 0
    for name in experts & source.packed.tensors.keys():
        packed = source.packed.tensors[name]
        for key in packed.keys:
            for part in [published[key]] if packed.experts is None else published[key]:
                assert part.contiguous().view(-1).view(torch.uint8).numpy().tobytes() in data
                found += part.nbytes
    packed_bytes = parts = 0
    for layer in manifest.layers:
        for tensor in manifest.layouts[layer.layout].tensors:
            if layout := parse_layout(tensor.dtype, tensor.shape):
                packed_bytes += layer.experts * tensor.bytes
                parts += layer.experts * len(layout.parts)
    assert 0 < found <= packed_bytes < found + 64 * parts, "the published bytes, and what aligns them"


def test_packing_goes_on_where_it_stopped(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stopped_pack(tiny.pair.published, tmp_path / "pack", 1.5)
    layers = [module.layer for module in source.experts]
    assert resumed_layers(source, tmp_path / "pack", monkeypatch) == layers[1:]


def test_a_corrupted_scale_is_noticed(tiny: Tiny, tmp_path: Path) -> None:
    """The comparison of the logits can fail: a bit of the scales of one layer's experts is another."""
    source = open_source(tiny.pair.published)
    found = ensure_pack(source, "published", None, "native", tiny.packs, ignore)
    pack = Path(shutil.copytree(found, tmp_path / "pack"))
    manifest = Manifest.read(pack)
    layer, tensor, layout = next(
        (layer, tensor, layout)
        for layer in manifest.layers
        for tensor in manifest.layouts[layer.layout].tensors
        if (layout := parse_layout(tensor.dtype, tensor.shape))
    )
    place = next(n for n, part in enumerate(layout.parts) if part.name in ("scale", "absmax", "blocks"))
    start, size = tensor.offset + layout.offsets[place], layout.parts[place].bytes
    with open(pack / EXPERT_FILE_NAME, "r+b") as file:
        for expert in range(layer.experts):
            file.seek(layer.offset + expert * manifest.layouts[layer.layout].record_bytes + start)
            scales = file.read(size)
            file.seek(-size, 1)
            file.write(bytes(byte ^ 0x04 for byte in scales))
    with open_tiny(tiny.pair.published, pack) as engine:
        assert not any(torch.equal(mine, theirs) for mine, theirs in zip(logits(engine), tiny.reference, strict=True))
    with pytest.raises(ExpertFileError, match="checksum"):
        open_tiny(tiny.pair.published, pack, verify=True)


def test_plan_from_the_config_alone(tiny: Tiny, tmp_path: Path) -> None:
    """Close to that with the weights: small differences come from matrices that the config does not tell of."""
    (tmp_path / "alone").mkdir()
    for file in tiny.pair.published.glob("*.json"):
        (tmp_path / "alone" / file.name).write_text(file.read_text())
    said: list[LoadProgress | Notice] = []
    plans = [
        plan_only(EngineSettings(model=str(folder), context_tokens=128, residency=ALL), said.append).plan
        for folder in (tmp_path / "alone", tiny.pair.published)
    ]
    notices = [event.text for event in said if isinstance(event, Notice)]
    assert len(notices) == 2
    assert all("its experts stay as published, the other weights are held in" in text for text in notices)
    alone, known = (plan.sizes for plan in plans)
    assert alone.slot_bytes == pytest.approx(known.slot_bytes, abs=8192)
    assert (alone.skeleton_bytes, alone.activation_bytes) == (known.skeleton_bytes, known.activation_bytes)
    native = plan_only(EngineSettings(model=str(tiny.pair.reference), context_tokens=128, residency=ALL), ignore).plan
    assert known.skeleton_bytes == native.sizes.skeleton_bytes, "it is decoded when it is loaded"
    assert known.slot_bytes <= native.sizes.slot_bytes
