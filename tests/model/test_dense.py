"""``--dense-format``: which matrices are quantised, that every family runs with them, and that the plan is exact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from offload.checkpoint.dense_file import ensure_dense
from offload.checkpoint.source import open_source
from offload.compute.dense import QuantizedEmbedding, QuantizedLinear
from offload.compute.kernels import load_kernels
from offload.compute.matrix import QuantizedMatrix, decode
from offload.compute.product import Products
from offload.config import SamplingSettings
from offload.engine import Engine
from offload.model import transformers_api as api
from offload.model.dense import DenseMatrix, find_dense
from offload.model.meta import build_meta_model
from offload.model.skeleton import load_skeleton, skeleton_bytes
from tests.engines import GREEDY, finish, open_tiny
from tests.model.test_bit_exact import DECODE_IDS, IDS, logits
from tests.tiny_models import TINY_ARCHITECTURES, build_tiny, load_reference, reference_logits, tiny_config

ROUTERS = ("gate", "router", "wg", "shared_expert_gate")


def quantized_modules(model: torch.nn.Module) -> dict[str, QuantizedLinear | QuantizedEmbedding]:
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, QuantizedLinear | QuantizedEmbedding)
    }


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights and buffers, everything that is shared counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in quantized_modules(model).values():
        tensors += [module.matrix.codes, module.matrix.params]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors if tensor.numel()}
    return sum(storage.nbytes() for storage in storages.values())


def meta_model(model_type: str, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> PreTrainedModel:
    config = tiny_config(model_type)
    for name, value in fields.items():
        setattr(config, name, value)
    return build_meta_model(config, dtype)


def dense_of(model: PreTrainedModel, dense_format: str) -> dict[str, DenseMatrix]:
    return {dense.name: dense for dense in find_dense(model, api.find_experts(model), dense_format)}


def decoded_reference(checkpoint: Path, engine: Engine) -> list[torch.Tensor]:
    """Logits of the stock model whose matrices are those that ``engine`` holds, decoded."""
    model = load_reference(checkpoint)
    with torch.no_grad():
        for path, module in quantized_modules(engine._model).items():
            model.get_parameter(f"{path}.weight").copy_(decode(module.matrix, torch.float32, None))
    seen = []
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.inference_mode():
        for step in [IDS, *(torch.tensor([[token]]) for token in DECODE_IDS)]:
            seen.append(model(input_ids=step, past_key_values=cache, use_cache=True).logits)
    return seen


def off(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> torch.Tensor:
    """Relative error of each position."""
    mine, reference = torch.cat(ours, 1)[0].float(), torch.cat(theirs, 1)[0].float()
    return (mine - reference).norm(dim=-1) / reference.norm(dim=-1)


# --- every architecture ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_logits(architecture: str, tmp_path: Path) -> None:
    """Those of the stock model with the decoded weights; and with 8 bits near those of its own weights."""
    checkpoint = build_tiny(architecture, tmp_path / "checkpoint")
    native = reference_logits(checkpoint, IDS, DECODE_IDS)
    for dense_format in ("int8", "int4"):
        with open_tiny(checkpoint, tmp_path / "packs", dense_format=dense_format) as engine:
            ours = logits(engine)
            assert off(ours, decoded_reference(checkpoint, engine)).median() < 1e-4
            assert quantized_modules(engine._model)
            _, done = finish(engine.generate("Hello there", GREEDY))
            assert done.reason in ("length", "stop")
        if dense_format == "int8":
            # not of all positions: where a router's choice is close another expert answers, and what follows differs
            assert off(ours, native).quantile(0.25) < 0.1


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_the_planned_bytes_are_those_held(architecture: str, tmp_path: Path) -> None:
    checkpoint = build_tiny(architecture, tmp_path / "checkpoint", dtype=torch.bfloat16, tokenizer=False)
    sizes = []
    for dense_format in ("native", "int8", "int4"):
        config_alone = open_source(checkpoint, weights=False)
        planned = skeleton_bytes(config_alone.model, config_alone.experts, dense_format)
        source = open_source(checkpoint)
        dense = ensure_dense(source, tmp_path, "tiny", dense_format, lambda event: None)
        model = load_skeleton(source, torch.device("cpu"), lambda event: None, dense, Products(load_kernels()))
        assert held_bytes(model) == planned
        sizes.append(planned)
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_routers_and_what_is_small_are_left(architecture: str) -> None:
    model = meta_model(architecture)
    experts = api.find_experts(model)
    for path, dense in dense_of(model, "int4").items():
        assert not set(path.split(".")) & set(ROUTERS), path
        path = path.replace("norm_attn_norm", "")  # DBRX's attention is in a block that is named after its norms
        assert "router" not in path and "norm" not in path and "conv1d" not in path
        assert dense.layout.rows >= 16 and dense.layout.columns >= 32
    for found in experts:
        router = api.find_router(model, found)
        quantised = [model.get_submodule(path).weight for path in dense_of(model, "int4")]
        assert router is None or all(router.weight is not weight for weight in quantised)


# --- the rules ------------------------------------------------------------------------------------------------------


def test_native_replaces_nothing() -> None:
    assert find_dense(meta_model("qwen3_moe"), [], "native") == ()


def test_tied_embeddings_share_one_matrix(tmp_path: Path) -> None:
    checkpoint = build_tiny("qwen3_moe", tmp_path / "checkpoint")
    with open_tiny(checkpoint, tmp_path / "packs", dense_format="int4") as engine:
        modules = quantized_modules(engine._model)
        embedding, head = modules["model.embed_tokens"], modules["lm_head"]
        assert isinstance(embedding, QuantizedEmbedding) and isinstance(head, QuantizedLinear)
        assert embedding.matrix is head.matrix
        assert engine._model.get_input_embeddings() is embedding and engine._model.get_output_embeddings() is head


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_delicate_has_8_bits_at_least(tied: bool) -> None:
    dense = dense_of(meta_model("qwen3_moe", tie_word_embeddings=tied), "int4")
    bits = {name: matrix.layout.bits for name, matrix in dense.items()}
    assert bits.pop("model.embed_tokens") == (8 if tied else 4)
    assert tied or bits.pop("lm_head") == 8
    kinds = {name.rpartition(".")[2]: count for name, count in bits.items()}
    assert kinds == {"q_proj": 4, "k_proj": 4, "v_proj": 8, "o_proj": 4}
    assert dense_of(meta_model("glm4_moe"), "int4")["model.layers.0.mlp.down_proj"].layout.bits == 8


@pytest.mark.parametrize("tied", [True, False])
def test_scaled_embeddings(tied: bool, tmp_path: Path) -> None:
    """Gemma's class multiplies its rows with a number: it is quantised too, and the head that is tied to it."""
    dense = dense_of(meta_model("gemma4_text", tie_word_embeddings=tied), "int4")
    assert dense["model.embed_tokens"].modules == (
        ("model.embed_tokens", "lm_head") if tied else ("model.embed_tokens",)
    )


def test_an_embedding_that_does_more_stays_and_so_does_a_head_tied_to_it() -> None:
    model = meta_model("inkling_text")  # its embedding has a norm
    assert "model.embed_tokens" not in dense_of(model, "int8") and "lm_head" in dense_of(model, "int8")
    model.all_tied_weights_keys["lm_head.weight"] = "model.embed_tokens.weight"
    assert "lm_head" not in dense_of(model, "int8")


def test_what_is_kept_in_float32_stays_but_for_the_head() -> None:
    dense = dense_of(meta_model("hy_v4"), "int4")
    assert dense["lm_head"].dtype == torch.float32
    assert all(matrix.dtype == torch.bfloat16 for name, matrix in dense.items() if name != "lm_head")
    assert not any("wg" in name.split(".") for name in dense_of(meta_model("hunyuan_v1_moe"), "int4"))


def test_a_real_shape() -> None:
    """Qwen3-Next has 512 experts, and projections with 512 outputs."""
    config = CONFIG_MAPPING["qwen3_next"](num_hidden_layers=4)
    dense = dense_of(build_meta_model(config, torch.bfloat16), "int4")
    names = {".".join(part for part in name.split(".") if not part.isdigit()) for name in dense}
    assert {f"model.layers.self_attn.{name}_proj" for name in "qkvo"} < names
    assert {f"model.layers.mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")} < names
    assert {"model.layers.linear_attn.in_proj_qkvz", "model.layers.linear_attn.out_proj", "lm_head"} < names
    assert not {name for name in names if name.endswith(("gate", "in_proj_ba"))}


def test_a_module_in_two_places_stays() -> None:
    model = meta_model("mixtral")
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    assert not {name for name in dense_of(model, "int4") if name.endswith(("layers.0.self_attn.q_proj",))}


# --- in an engine ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("qwen2_moe", tmp_path_factory.mktemp("tiny") / "checkpoint", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("packs")


def test_the_same_tokens_at_any_number_of_slots(checkpoint: Path, packs: Path) -> None:
    sampled = SamplingSettings(temperature=1.0, seed=5, max_new_tokens=20)
    texts = set()
    for residency in (1e-9, 0.3, 1.0):
        with open_tiny(checkpoint, packs, dense_format="int4", residency=residency, prefill_chunk=24) as engine:
            texts.add(finish(engine.generate("The router picks some of the experts", sampled))[1].text)
    assert len(texts) == 1


def test_the_plan_and_the_statistics_say_it(checkpoint: Path, packs: Path) -> None:
    sizes = {}
    for dense_format in ("native", "int8"):
        with open_tiny(checkpoint, packs, dense_format=dense_format) as engine:
            sizes[dense_format] = engine.plan.sizes.skeleton_bytes
            assert engine.stats().dense_format == dense_format
            assert engine.stats().format == "native"
            assert held_bytes(engine._model) == sizes[dense_format]
    assert sizes["int8"] < sizes["native"] * 0.6


def test_all_products_share_one_buffer(checkpoint: Path, packs: Path) -> None:
    with open_tiny(checkpoint, packs, dense_format="int8", format="int8") as engine:
        modules = quantized_modules(engine._model).values()
        owners = {id(module.products) for module in modules} | {id(engine._runtime._compute.products)}
        assert len(owners) == 1


def test_weights_stand_at_64_bytes_in_memory_of_their_own(checkpoint: Path, packs: Path) -> None:
    with open_tiny(checkpoint, packs, dense_format="int4") as engine:
        matrices: list[QuantizedMatrix] = [module.matrix for module in quantized_modules(engine._model).values()]
        for matrix in matrices:
            for tensor in (matrix.codes, matrix.params):
                assert tensor.data_ptr() % 64 == 0
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        mapped = Path("/proc/self/maps")
        assert not mapped.exists() or "dense-int4" not in mapped.read_text()
