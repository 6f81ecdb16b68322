"""The recipe: all that distillation found out, small enough to be kept in the repository.

A safetensors file. Its metadata entry `recipe` is a JSON object (format, version, shape, source); its tensors are, with
L layers, F FFN neurons, H hidden, E experts and rank r:

    order                  int16   [L, F]        dense neuron at each carved place, shared ones first
    router                 float16 [L, E, H]
    norm1, norm2           float16 [L, H]        input_layernorm, post_attention_layernorm
    scale                  float16 [L, F]        factor of each neuron's output, in the carved order
    X_a, X_a_unit          int8    [L, r, in],   float32 [L, r]
    X_b, X_b_unit          int8    [L, out, r],  float32 [L, r]

for X in qkv, o, gate_up, down. The correction of a weight `[out, in]` (rows of q, k, v or of gate, up stacked, FFN
neurons in the carved order) is `(X_b * X_b_unit) @ (X_a * X_a_unit[:, None])`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from offload.demo.errors import DemoBuildError
from offload.demo.shape import CarveShape

CORRECTED = ("qkv", "o", "gate_up", "down")
_FORMAT, _VERSION = "run-local demo recipe", 1


@dataclass
class Recipe:
    """See the module's docstring; `source` names the dense weights that the recipe belongs to."""

    shape: CarveShape
    tensors: dict[str, Tensor]
    source: dict[str, str] = field(default_factory=dict)

    def correction(self, layer: int, name: str) -> Tensor:
        """Return the float32 `[out, in]` correction of weight `name` (one of `CORRECTED`) in `layer`."""
        t = self.tensors
        b = t[name + "_b"][layer].float() * t[name + "_b_unit"][layer]
        return b @ (t[name + "_a"][layer].float() * t[name + "_a_unit"][layer][:, None])


def quantise(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Round `values` to int8 with one float32 unit for each slice along `dim`; returns (int8 like values, units)."""
    reduced = [d for d in range(values.ndim) if d != dim]
    unit = values.abs().amax(reduced).clamp_min(1e-12) / 127
    shape = [-1 if d == dim else 1 for d in range(values.ndim)]
    return (values / unit.view(shape)).round().to(torch.int8), unit.float()


def make_recipe(shape: CarveShape, order: Tensor, params: list[dict[str, Tensor]], source: dict[str, str]) -> Recipe:
    """Turn trained parameters (see `distil/train.py`) into a recipe; `order` is int64 `[layers, ffn]`."""
    tensors: dict[str, Tensor] = {"order": order.to(torch.int16)}
    for name in ("router", "norm1", "norm2", "scale"):
        values = torch.stack([layer[name] for layer in params])
        if name == "router":
            # Softmax does not see what all experts share; without it the small differences survive 16 bits.
            values = values - values.mean(1, keepdim=True)
        tensors[name] = values.to(torch.float16)
    for name in CORRECTED:
        for side, dim in (("_a", 0), ("_b", 1)):
            pairs = [quantise(layer[name + side], dim) for layer in params]
            tensors[name + side] = torch.stack([values for values, _ in pairs])
            tensors[name + side + "_unit"] = torch.stack([unit for _, unit in pairs])
    recipe = Recipe(shape, tensors, source)
    validate(recipe, "the new recipe")
    return recipe


def validate(recipe: Recipe, name: str) -> None:
    """Raise `DemoBuildError` naming `name` if a tensor is missing, misshaped or not finite, or `order` is no order."""
    s, t = recipe.shape, recipe.tensors
    fixed = {
        "order": (torch.int16, (s.layers, s.ffn)),
        "router": (torch.float16, (s.layers, s.experts, s.hidden)),
        "norm1": (torch.float16, (s.layers, s.hidden)),
        "norm2": (torch.float16, (s.layers, s.hidden)),
        "scale": (torch.float16, (s.layers, s.ffn)),
    }
    inputs = {"qkv": s.hidden, "gate_up": s.hidden, "down": s.ffn}
    outputs = {"o": s.hidden, "gate_up": 2 * s.ffn, "down": s.hidden}

    def refuse(why: str) -> None:
        raise DemoBuildError(f"{name} is damaged ({why}); reinstall run-local")

    for key in CORRECTED:
        for side in ("_a", "_b", "_a_unit", "_b_unit"):
            if key + side not in t:
                refuse(f"no tensor {key + side}")
        a, b = t[key + "_a"], t[key + "_b"]
        if a.ndim != 3 or b.ndim != 3:
            refuse(f"wrong shape of {key}")
        rank = a.shape[1]
        fixed[key + "_a"] = (torch.int8, (s.layers, rank, inputs.get(key, a.shape[2])))
        fixed[key + "_b"] = (torch.int8, (s.layers, outputs.get(key, b.shape[1]), rank))
        fixed[key + "_a_unit"] = fixed[key + "_b_unit"] = (torch.float32, (s.layers, rank))
    for key, (dtype, shape) in fixed.items():
        if key not in t:
            refuse(f"no tensor {key}")
        if t[key].dtype != dtype or tuple(t[key].shape) != shape:
            refuse(f"tensor {key} is {t[key].dtype} {tuple(t[key].shape)}, not {dtype} {shape}")
        if t[key].is_floating_point() and not bool(t[key].isfinite().all()):
            refuse(f"tensor {key} has values that are not finite")
    places = torch.arange(s.ffn, dtype=torch.int16).expand(s.layers, s.ffn)
    if not torch.equal(t["order"].sort(-1).values, places):
        refuse("the order of the neurons is no permutation")


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the file; an old one is replaced in one step."""
    from safetensors.torch import save_file

    head = {"format": _FORMAT, "version": _VERSION, "shape": asdict(recipe.shape), "source": recipe.source}
    part = path.with_name(path.name + ".part")
    save_file({k: v.contiguous() for k, v in recipe.tensors.items()}, str(part), {"recipe": json.dumps(head)})
    part.replace(path)


def read_recipe(path: Path) -> Recipe:
    """Read and validate a recipe; raises `DemoBuildError` if it is missing, damaged or of another version."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            head = json.loads((file.metadata() or {}).get("recipe", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, ValueError) as error:
        raise DemoBuildError(f"the demo recipe {path.name} cannot be read ({error}); reinstall run-local") from error
    if head.get("format") != _FORMAT or head.get("version") != _VERSION:
        raise DemoBuildError(f"{path.name} is not a demo recipe of version {_VERSION}; reinstall run-local")
    try:
        shape = CarveShape(**head["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise DemoBuildError(f"{path.name} is damaged ({error}); reinstall run-local") from error
    recipe = Recipe(shape, tensors, dict(head.get("source", {})))
    validate(recipe, path.name)
    return recipe
