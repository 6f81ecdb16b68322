"""Quantised experts: an experts module gives what its own code gives with the decoded weights, and a model gives nearly
what it gives in its native format, the same at any cache size and policy.
"""

from __future__ import annotations

from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.keys import ExpertKey
from offload.checkpoint.formats import get_format
from offload.compute.kernels import load_kernels
from offload.compute.matrix import QuantizedMatrix, decode
from offload.compute.product import Products
from offload.compute.quantized_experts import QuantizedExperts, add_in_order
from offload.config import SamplingSettings
from offload.events import Token
from offload.model.transformers_api import gates_with_silu
from tests.engines import finish, open_tiny
from tests.model.test_bit_exact import ALL, HALF, SMALLEST, assert_equal, logits
from tests.model.test_experts import EXPERTS, experts_module
from tests.tiny_models import TINY_ARCHITECTURES, build_tiny

HIDDEN, INNER = 96, 40  # neither is a multiple of a group
MODULES = {  # name -> (module, class, config); what is special about it
    "silu": ("mixtral", "MixtralExperts", {}),
    "gelu": ("mixtral", "MixtralExperts", {"hidden_act": "gelu"}),
    "transposed, biases, own gate": ("gpt_oss", "GptOssExperts", {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}),
    "no gate": ("nemotron_h", "NemotronHExperts", {"mlp_hidden_act": "relu2"}),
    "a norm after it": ("muse_spark", "MuseSparkExperts", {}),
}
SIZES = {"hidden_size": HIDDEN, "moe_hidden_size": HIDDEN, "moe_intermediate_size": INNER, "intermediate_size": INNER}
# Of the result of a module; with a norm or a steep gate rounding counts for more than in a product alone.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def need_kernels(kernels: str) -> None:
    if kernels == "auto" and load_kernels() is None:
        pytest.skip("this machine has no compiled kernels")


class Quantized:
    """An experts module with its weights in records, and the same module in float64 with the weights decoded."""

    def __init__(self, name: str, format_name: str, dtype: torch.dtype) -> None:
        family, cls, config = MODULES[name]
        module = experts_module(
            getattr(import_module(f"transformers.models.{family}.modeling_{family}"), cls), **(SIZES | config)
        ).to(dtype)
        weights = {n: p for n, p in module._parameters.items() if p is not None and p.shape[0] == EXPERTS}
        transposed = list(weights) if module.is_transposed else []
        weight_format = get_format(format_name)
        layout = weight_format.layout({n: (tuple(p.shape[1:]), p.dtype) for n, p in weights.items()}, transposed)
        self.module = module
        self.reference = deepcopy(module).double()
        self.records = torch.zeros(EXPERTS, layout.record_bytes, dtype=torch.uint8)
        self.views = []
        for expert, record in enumerate(self.records):
            weight_format.encode(layout, {n: p[expert] for n, p in weights.items()}, record, transposed)
            self.views.append(weight_format.views(layout, record))
            for parameter, view in self.views[-1].items():
                exact = decode(view, torch.float32, None) if isinstance(view, QuantizedMatrix) else view
                exact = exact.t() if isinstance(view, QuantizedMatrix) and parameter in transposed else exact
                self.reference._parameters[parameter].data[expert] = exact  # type: ignore[union-attr]
        for parameter in weights:
            del module._parameters[parameter]

    def run(self, products: Products, event: tuple[torch.Tensor, ...], groups: Any = None) -> torch.Tensor:
        """One event; ``groups`` are the experts of each call, by default all in one."""
        compute = QuantizedExperts(products, gates_with_silu)
        running = compute.begin(self.module, *event, lambda key: self.views[key.expert])
        for group in groups or [running.experts]:
            running.compute([ExpertKey(3, expert) for expert in group if expert in running.experts])
        return running.result()

    def expected(self, event: tuple[torch.Tensor, ...]) -> torch.Tensor:
        hidden, index, weights = event
        result: torch.Tensor = self.reference(hidden.double(), index, weights.double())
        return result


def make_event(tokens: int, dtype: torch.dtype, top_k: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(tokens)])
    return hidden, index, torch.rand(tokens, top_k, generator=generator).to(dtype)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


# --- a module -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("few", [0, 4, 1 << 30], ids=["decoded", "both", "kernel"])
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("format_name", ["int8", "int4", "mixed"])
@pytest.mark.parametrize("name", MODULES)
def test_as_the_module_itself_with_decoded_weights(name: str, format_name: str, dtype: torch.dtype, few: int) -> None:
    need_kernels("auto" if few else "torch")
    quantized = Quantized(name, format_name, dtype)
    for products in (Products(load_kernels(), few),) if few else (Products(None), Products(load_kernels(), 0)):
        for tokens in (1, 2, 9, 70):
            event = make_event(tokens, dtype)
            result = quantized.run(products, event)
            assert (result.dtype, result.shape) == (dtype, event[0].shape)
            assert relative(result, quantized.expected(event)) < BOUNDS[dtype], f"{tokens} tokens"


@pytest.mark.parametrize("few", [0, 4, 1 << 30], ids=["decoded", "both", "kernel"])
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("name", MODULES)
def test_order_and_groups_of_the_experts_do_not_matter(name: str, dtype: torch.dtype, few: int) -> None:
    need_kernels("auto" if few else "torch")
    quantized, products = Quantized(name, "mixed", dtype), Products(load_kernels() if few else None, few)
    for tokens in (1, 5, 30):
        event = make_event(tokens, dtype)
        together = quantized.run(products, event)
        for groups in ([[e] for e in range(EXPERTS)], [[5, 0, 3], [4, 2], [1]], [list(range(EXPERTS))[::-1]]):
            assert torch.equal(quantized.run(products, event, groups), together)


def test_few_pairs_are_sorted_as_torch_sorts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, chance = Quantized("silu", "int4", torch.float32), torch.Generator().manual_seed(2)
    for tokens in (2, 16):
        hidden = torch.randn(tokens, HIDDEN, generator=chance)
        index = torch.randint(0, EXPERTS, (tokens, 3), generator=chance)
        index[0, 1] = index[1, 0]
        event = (hidden, index, torch.rand(tokens, 3, generator=chance))
        outputs = []
        for few in (0, 512):
            monkeypatch.setattr("offload.compute.quantized_experts._FEW_PAIRS", few)
            outputs.append(quantized.run(Products(load_kernels(), 16), event))
        assert torch.equal(*outputs)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_odd_routing(kernels: str) -> None:
    """Ids beyond the last expert, an expert that a token chose twice, and tokens with no expert at all."""
    need_kernels(kernels)
    quantized = Quantized("silu", "int4", torch.float32)
    products = Products(load_kernels() if kernels == "auto" else None)
    for tokens in (1, 6):
        hidden, index, weights = make_event(tokens, torch.float32)
        index[0] = torch.tensor([4, EXPERTS, 4])
        if tokens > 1:
            index[3] = EXPERTS
            index[5, 1] = EXPERTS
        result = quantized.run(products, (hidden, index, weights))
        known = index < EXPERTS
        expected = quantized.expected((hidden, index.where(known, 0), weights * known))
        assert relative(result, expected) < BOUNDS[torch.float32]
        assert tokens == 1 or not result[3].any()


# --- a model --------------------------------------------------------------------------------------------------------


def far(found: list[torch.Tensor], native: list[torch.Tensor]) -> float:
    """Median over positions of the error of the logits relative to their size.

    The median, since another expert is chosen where two are nearly as good: that is another model, not an error.
    """
    pairs = zip(found, native, strict=True)
    errors = [
        (mine - theirs).double().square().mean(-1).sqrt() / theirs.double().square().mean(-1).sqrt()
        for mine, theirs in pairs
    ]
    return float(torch.cat([error.flatten() for error in errors]).median())


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_every_architecture_with_int8(architecture: str, tmp_path: Path) -> None:
    checkpoint = build_tiny(architecture, tmp_path / "checkpoint")
    with open_tiny(checkpoint, tmp_path / "packs") as engine:
        native = logits(engine)
    with open_tiny(checkpoint, tmp_path / "packs", format="int8", residency=HALF) as engine:
        events, done = finish(engine.generate("the expert that", SamplingSettings(temperature=0, max_new_tokens=5)))
        assert done.reason in ("length", "stop")
        assert sum(isinstance(event, Token) for event in events) > 0
        engine.reset()
        assert far(logits(engine), native) < 0.025


# silu; transposed, interleaved, biases; no gate; own gate and shared experts; gelu; ids beyond the last expert
FAMILIES = ("qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v4", "gemma4_text", "zaya")
NEAR = {"int8": 0.025, "mixed": 0.25, "int4": 0.35}


@pytest.mark.parametrize(
    ("format_name", "kernels"), [("int8", "auto"), ("mixed", "auto"), ("int4", "auto"), ("mixed", "torch")]
)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_same_logits_at_any_cache_size_and_policy(
    architecture: str, format_name: str, kernels: str, tmp_path: Path
) -> None:
    need_kernels(kernels)
    checkpoint = build_tiny(architecture, tmp_path / "checkpoint")
    with open_tiny(checkpoint, tmp_path / "packs") as engine:
        native = logits(engine)

    def run(residency: float, policy: str) -> list[torch.Tensor]:
        settings = {"format": format_name, "kernels": kernels, "residency": residency, "policy": policy}
        with open_tiny(checkpoint, tmp_path / "packs", **settings) as engine:
            found = logits(engine)
            engine._runtime.cache.check_integrity()
            return found

    whole = run(ALL, "lru")
    assert 0 < far(whole, native) < NEAR[format_name]
    for residency, policy in ((SMALLEST, "lru"), (HALF, "ewma:half_life=4")):
        assert_equal(run(residency, policy), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", [name for name in FAMILIES if name != "deepseek_v4"])  # not with float16
def test_other_dtypes(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = build_tiny(architecture, tmp_path / "checkpoint", dtype=dtype)
    with open_tiny(checkpoint, tmp_path / "packs") as engine:
        native = logits(engine)
    found = []
    for residency in (SMALLEST, ALL):
        with open_tiny(checkpoint, tmp_path / "packs", format="int8", residency=residency) as engine:
            found.append(logits(engine))
    assert_equal(*found)
    assert far(found[0], native) < 0.06


@pytest.mark.parametrize("architecture", FAMILIES[:3])
def test_the_same_text_at_any_cache_size(architecture: str, tmp_path: Path) -> None:
    checkpoint = build_tiny(architecture, tmp_path / "checkpoint", dtype=torch.bfloat16)
    sampling = SamplingSettings(temperature=0, max_new_tokens=12, ignore_eos=True)
    texts = []
    for residency, policy in ((SMALLEST, "lru"), (HALF, "ewma"), (ALL, "lru")):
        settings = {"format": "int4", "residency": residency, "policy": policy}
        with open_tiny(checkpoint, tmp_path / "packs", **settings) as engine:
            events, _ = finish(engine.generate("what is the capital of", sampling))
            texts.append([event.id for event in events if isinstance(event, Token)])
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 12


def test_one_expert_after_the_other_gives_the_bits_of_all_rows_at_once() -> None:
    """What a card must do to give the same sum every time changes nothing on the CPU."""
    torch.manual_seed(4)
    counts, tokens = [3, 5, 1, 7, 4], 8
    token_of = torch.cat([torch.randperm(tokens)[:count] for count in counts]).to(torch.int32)
    rows = torch.randn(sum(counts), 33) * torch.logspace(-3, 3, sum(counts))[:, None]
    starts = [sum(counts[:number]) for number in range(len(counts))]
    at_once, in_turn = torch.zeros(2, tokens, 33).unbind()
    at_once.index_add_(0, token_of, rows)
    add_in_order(in_turn, token_of, rows, zip(starts, counts, strict=True))
    assert torch.equal(at_once, in_turn)
    other = torch.zeros(tokens, 33)
    add_in_order(other, token_of, rows, [*zip(starts, counts, strict=True)][::-1])
    assert not torch.equal(other, in_turn), "the order matters"
