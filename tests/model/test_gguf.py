"""GGUF files: bit for bit what the stock model gives with the weights as the ``gguf`` package decodes them."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from offload.checkpoint.dense_file import ensure_dense
from offload.checkpoint.fingerprint import checkpoint_fingerprint
from offload.checkpoint.formats.gguf import BLOCKS, GgufLayout
from offload.checkpoint.formats.methods import parse_layout
from offload.checkpoint.gguf_file import gguf_files, read_header
from offload.checkpoint.library import ensure_pack
from offload.checkpoint.manifest import EXPERT_FILE_NAME, Manifest
from offload.checkpoint.model_folder import check_model_folder
from offload.checkpoint.source import open_source
from offload.config import EngineSettings, SamplingSettings
from offload.errors import ModelError
from offload.opening import plan_only
from tests.checkpoint.packs import ignore, resumed_layers, stopped_pack, write_pack
from tests.engines import finish, open_tiny
from tests.gguf_models import GGUF_MODELS, build_gguf, publish_gguf
from tests.model.test_bit_exact import ALL, DECODE_IDS, HALF, IDS, SMALLEST, assert_equal, logits
from tests.published_models import Pair
from tests.tiny_models import reference_logits


@pytest.fixture(scope="module", params=GGUF_MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """To be read only."""
    return build_gguf(request.param, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """To be read only."""
    return build_gguf("llama, Q4_0 and Q8_0", tmp_path_factory.mktemp("small"))


def test_logits_equal_stock_with_decoded_weights(pair: Pair, tmp_path: Path) -> None:
    reference = reference_logits(pair.reference, IDS, DECODE_IDS)
    for residency in (SMALLEST, HALF, ALL):
        settings = {"residency": residency, "verify": residency == ALL, "kernels": "torch"}
        with open_tiny(pair.published, tmp_path, **settings) as engine:
            assert_equal(logits(engine), reference)
            engine._runtime.cache.check_integrity()


def test_other_formats_are_packed_from_the_decoded_weights(pair: Pair, tmp_path: Path) -> None:
    packs, dense = [], []
    for path in pair:
        source = open_source(path)
        manifest, data = write_pack(source, tmp_path / path.name, format_name="int8")
        packs.append((manifest.layouts, manifest.layers, data))
        file = ensure_dense(source, tmp_path / path.name, "tiny", "int8", ignore)
        assert file is not None
        dense.append([file.read(matrix, lambda size: None) for matrix in file.matrices])
        file.close()
    assert packs[0] == packs[1]
    for mine, theirs in zip(*dense, strict=True):
        assert torch.equal(mine.codes, theirs.codes) and torch.equal(mine.params, theirs.params)


def test_record_holds_the_blocks_of_the_file(pair: Pair, tmp_path: Path) -> None:
    source = open_source(pair.published)
    manifest, data = write_pack(source, tmp_path / "pack")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(pair.published).tensors}
    found = held = parts = 0
    for name, tensor in tensors.items():
        if "_exps" in name:
            for expert in tensor.data:
                assert expert.tobytes() in data
                found += expert.nbytes
    for layer in manifest.layers:
        for place in manifest.layouts[layer.layout].tensors:
            assert parse_layout(place.dtype, place.shape) is not None
            held, parts = held + layer.experts * place.bytes, parts + layer.experts
    assert found <= held < found + 64 * parts


def test_packing_goes_on_where_it_stopped(small: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stopped_pack(small.published, tmp_path / "pack", 1.5)
    assert resumed_layers(source, tmp_path / "pack", monkeypatch) == [1, 2, 3]


def test_plan(small: Pair) -> None:
    plans = [
        plan_only(EngineSettings(model=str(path), context_tokens=128, residency=ALL), ignore).plan.sizes
        for path in small
    ]
    assert plans[0].skeleton_bytes == plans[1].skeleton_bytes, "it is decoded when it is loaded"
    assert plans[0].slot_bytes < plans[1].slot_bytes


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_as_the_package_decodes_them(kind: int) -> None:
    name, weights, size = BLOCKS[kind]
    blocks = torch.randint(0, 256, (6, 5 * size), dtype=torch.uint8, generator=torch.Generator().manual_seed(kind))
    layout = GgufLayout((6, 5 * weights), name)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (weights, size)
    with np.errstate(all="ignore"):  # some of the random scales are infinite
        expected = torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(kind)).copy())
        found = layout.decode_rows((blocks,), slice(None), torch.float32)
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())
        assert torch.equal(
            layout.decode_rows((blocks,), slice(2, 4), torch.float32).nan_to_num(), found[2:4].nan_to_num()
        )


# --- the config and the tokenizer -----------------------------------------------------------------------------------


def describe(writer: gguf.GGUFWriter) -> None:
    """What llama.cpp's converter writes of the tiny qwen3_moe and its tokenizer."""
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(8)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    alphabet = sorted(gguf_alphabet())
    alphabet += ["th"]
    tokens = ["<|endoftext|>", "<s>", "<|im_end|>", "<|im_start|>", *alphabet]
    tokens += [f"<extra{number}>" for number in range(320 - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * len(alphabet) + [5] * (316 - len(alphabet)))
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(0)


def gguf_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel.alphabet())


def test_a_file_alone(tmp_path: Path) -> None:
    """Config and tokenizer come from the file, read by transformers."""
    model = GGUF_MODELS["qwen3moe, as Q4_K_M"]._replace(
        kinds={"_exps|attn_": gguf.GGMLQuantizationType.Q8_0}, sizes={"norm_topk_prob": True}
    )
    pair = publish_gguf(model, tmp_path, describe)
    reference = reference_logits(pair.reference, IDS, DECODE_IDS)
    for path in (pair.published, pair.published.parent):
        with open_tiny(path, tmp_path / "packs", kernels="torch") as engine:
            assert_equal(logits(engine), reference)
            engine.reset()
            sampling = SamplingSettings(temperature=0, max_new_tokens=3)
            assert finish(engine.generate("the expert", sampling))[1].reason in ("length", "stop")


def test_latent_attention_in_one_piece(tmp_path: Path) -> None:
    """As files of 2024 have it: the same model as with keys and values apart."""
    model = GGUF_MODELS["deepseek2, keys and values apart"]._replace(sizes={"num_hidden_layers": 2})
    logits_of = []
    for name, split in (("apart", True), ("whole", False)):
        pair = publish_gguf(model, tmp_path / name, split_latent=split)
        assert any("attn_kv_b" in tensor.name for tensor in read_header(pair.published).tensors) is not split
        with open_tiny(pair.published, tmp_path / "packs" / name) as engine:
            logits_of.append(logits(engine))
    assert_equal(*logits_of)


def test_the_config_must_be_beside_some_files(small: Pair, tmp_path: Path) -> None:
    alone = Path(shutil.copy(small.published, tmp_path / "model.gguf"))
    with pytest.raises(ModelError, match=r"put config\.json and the tokenizer's files of the original model into"):
        open_source(alone)


# --- files ----------------------------------------------------------------------------------------------------------


def test_fingerprint_tells_files_apart(small: Pair, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small.published.parent, tmp_path / "copy")) / small.published.name
    assert checkpoint_fingerprint(copy) == checkpoint_fingerprint(small.published)
    assert checkpoint_fingerprint(copy.parent) == checkpoint_fingerprint(copy)
    with open(copy, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert checkpoint_fingerprint(copy) != checkpoint_fingerprint(small.published)


def test_several_models_in_a_folder(small: Pair, tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf", "mmproj-one.gguf"):
        shutil.copy(small.published, tmp_path / name)
    with pytest.raises(ModelError, match=r"several GGUF models \(one.gguf, two.gguf\); name one: --model .*one.gguf"):
        gguf_files(tmp_path)
    assert gguf_files(tmp_path / "two.gguf") == (tmp_path / "two.gguf",)
    check_model_folder(tmp_path / "two.gguf")


def test_a_model_in_parts(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / f"m-{number:05d}-of-00003.gguf").touch()
    parts = gguf_files(tmp_path)
    assert [part.name for part in parts] == [f"m-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    assert gguf_files(parts[1]) == parts
    parts[2].unlink()
    with pytest.raises(ModelError, match=r"m-00003-of-00003\.gguf: this part of 3 of the GGUF model is missing"):
        gguf_files(tmp_path)


def test_parts_are_one_model(small: Pair, tmp_path: Path) -> None:
    """The second part has the tensors of the last layers."""
    folder = Path(shutil.copytree(small.published.parent, tmp_path / "parts"))
    reader = gguf.GGUFReader(folder / "model.gguf")
    for number in (1, 2):
        writer = gguf.GGUFWriter(folder / f"m-{number:05d}-of-00002.gguf", "llama")
        for tensor in reader.tensors:
            if (number == 2) == tensor.name.startswith(("blk.2.", "blk.3.")):
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    (folder / "model.gguf").unlink()
    whole, parts = (write_pack(open_source(path), tmp_path / f"{path.name}-pack") for path in (small.published, folder))
    assert (whole[0].checksums, whole[1]) == (parts[0].checksums, parts[1])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: b"GGML" + data[4:], "is no GGUF file, or damaged"),
        (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "GGUF version 9 is not supported"),
        (lambda data: data[:100], "the GGUF file is damaged or incomplete"),
        (
            lambda data: data.replace(b"llama", b"gemma", 1),
            "architecture 'gemma' are not supported .*use the safetensors",
        ),
        (lambda data: data.replace(b"llama", b"olmoe", 1), "architecture 'olmoe', but config.json .*'mixtral'"),
        (lambda data: data.replace(b"blk.3.ffn_up_exps", b"blk.3.ffn_up_expx"), "has no blk.3.ffn_up_exps.weight"),
        (lambda data: data[:-5000], "cannot be read"),
    ],
    ids=["magic", "version", "header", "architecture", "config", "experts", "end"],
)
def test_damaged_and_unknown_files(change: Any, match: str, small: Pair, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small.published.parent, tmp_path / "model"))
    path = folder / "model.gguf"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ModelError, match=match) as caught, open_tiny(path, tmp_path / "packs"):
        pass
    assert "\n" not in str(caught.value)


def test_header_says_what_the_package_reads(small: Pair) -> None:
    header, reader = read_header(small.published), gguf.GGUFReader(small.published)
    assert header.architecture == "llama"
    for mine, theirs in zip(header.tensors, reader.tensors, strict=True):
        assert (mine.name, mine.kind, mine.offset) == (theirs.name, theirs.tensor_type, theirs.data_offset)
        assert mine.shape == tuple(reversed(theirs.shape.tolist()))


def test_packs_are_found_again(small: Pair, tmp_path: Path) -> None:
    source = open_source(small.published)
    folder = ensure_pack(source, "model.gguf", None, "native", tmp_path, ignore)
    assert ensure_pack(source, "model.gguf", None, "native", tmp_path, ignore) == folder
    assert (folder / EXPERT_FILE_NAME).stat().st_size == Manifest.read(folder).total_bytes
