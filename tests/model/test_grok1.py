"""Grok-1, for which transformers has no class, against a model in numpy that was written from the description alone.

It reads the tensors by their published names and computes in float64, whole sequences at a time: without a KV cache, an
experts interface, or anything else that is tested here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from offload.engine import Engine
from tests.engines import open_tiny
from tests.model.test_bit_exact import DECODE_IDS, IDS, logits
from tests.tiny_models import build_tiny

Array = np.ndarray[Any, np.dtype[np.float64]]
PUBLISHED_CONFIG = Path(__file__).parents[1] / "data" / "configs" / "grok-1" / "config.json"


@dataclass
class Reference:
    """``cap`` None leaves out the squeezing of the attention scores."""

    weights: dict[str, Array]
    config: dict[str, Any]
    cap: float | None

    def logits(self, ids: list[int]) -> Array:
        states = self.weights["model.embed_tokens.weight"][ids] * self.config["embedding_multiplier_scale"]
        for layer in range(self.config["num_hidden_layers"]):
            states = states + self.norm(
                f"{layer}.post_attn", self.attention(layer, self.norm(f"{layer}.pre_attn", states))
            )
            states = states + self.norm(f"{layer}.post_moe", self.experts(layer, self.norm(f"{layer}.pre_moe", states)))
        states = rms(states) * self.weights["model.norm.scale"]
        return states @ self.weights["model.embed_tokens.weight"].T * self.config["output_multiplier_scale"]

    def norm(self, name: str, states: Array) -> Array:
        return rms(states) * self.weights[f"model.layers.{name}_norm.scale"]

    def attention(self, layer: int, states: Array) -> Array:
        heads, shared = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        width = self.config["hidden_size"] // heads
        query, key, value = (
            (states @ self.weights[f"model.layers.{layer}.attn.{name}_proj.weight"].T).reshape(len(states), -1, width)
            for name in "qkv"
        )
        query, key = rotated(query), rotated(key)
        output = np.empty((len(states), heads, width))
        for head in range(heads):
            mine = head // (heads // shared)
            scores = query[:, head] @ key[:, mine].T * self.config["attn_output_multiplier"]
            if self.cap is not None:
                scores = self.cap * np.tanh(scores / self.cap)
            scores[np.triu_indices(len(states), 1)] = -np.inf
            output[:, head] = softmax(scores) @ value[:, mine]
        return output.reshape(len(states), -1) @ self.weights[f"model.layers.{layer}.attn.o_proj.weight"].T

    def experts(self, layer: int, states: Array) -> Array:
        block = f"model.layers.{layer}.moe_block"
        shares = softmax(states @ self.weights[f"{block}.gate.weight"].T)
        output = np.zeros_like(states)
        for token, share in enumerate(shares):
            for expert in np.argsort(-share)[: self.config["num_experts_per_tok"]]:
                gate, up, down = (
                    self.weights[f"{block}.experts.{expert}.{name}.weight"]
                    for name in ("linear", "linear_v", "linear_1")
                )
                output[token] += share[expert] * (gelu(states[token] @ gate.T) * (states[token] @ up.T)) @ down.T
        return output


def rms(states: Array) -> Array:
    return states / np.sqrt((states**2).mean(-1, keepdims=True) + 1e-5)


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def gelu(x: Array) -> Array:
    """The tanh form."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotated(heads: Array) -> Array:
    """[T, heads, width]: the two halves of a head turn against each other, each pair of dimensions at its own pace."""
    tokens, _, width = heads.shape
    angles = np.arange(tokens)[:, None] * 10000.0 ** (-np.arange(0, width, 2) / width)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    low, high = heads[..., : width // 2], heads[..., width // 2 :]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: the config has no ``model_type`` but the names of classes that come with the checkpoint."""
    folder = build_tiny("grok-1", tmp_path_factory.mktemp("grok") / "checkpoint")
    published = json.loads(PUBLISHED_CONFIG.read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["model_type"], config["rope_parameters"], config["hidden_act"]
    assert config.keys() - published.keys() <= {"dtype", "initializer_range", "transformers_version"}
    config |= {"auto_map": published["auto_map"], "architectures": published["architectures"]}
    config["max_attn_value"] = 2.0
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs")


def reference(checkpoint: Path, cap: float | None) -> list[Array]:
    """Of the prompt's positions, then of each decode step, as :func:`tests.model.test_bit_exact.logits` has them."""
    tensors: dict[str, Array] = {}
    for file in checkpoint.glob("*.safetensors"):
        tensors |= {name: tensor.astype(np.float64) for name, tensor in load_file(file).items()}
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    prompt = IDS[0].tolist()
    whole = Reference(tensors, config, cap).logits(prompt + DECODE_IDS)
    return [whole[: len(prompt)], *(whole[len(prompt) + step][None] for step in range(len(DECODE_IDS)))]


def differences(engine: Engine, expected: list[Array]) -> list[float]:
    found = logits(engine)
    return [
        float(np.abs(ours[0].cpu().double().numpy() - theirs).max())
        for ours, theirs in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize(
    "settings",
    [{"residency": 1e-9}, {"residency": 1.0}, {"residency": 0.4, "device": "simulated", "prefetch": "next-gate"}],
)
def test_logits_are_those_of_the_description(settings: dict[str, Any], checkpoint: Path, packs: Path) -> None:
    expected = reference(checkpoint, cap=2.0)
    with open_tiny(checkpoint, packs, **settings) as engine:
        assert max(differences(engine, expected)) < 2e-5
        engine._runtime.cache.check_integrity()


def test_the_squeezed_scores_matter(checkpoint: Path, packs: Path) -> None:
    with open_tiny(checkpoint, packs) as engine:
        assert min(differences(engine, reference(checkpoint, cap=None))) > 1e-3
