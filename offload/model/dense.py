"""Which matrices of the skeleton are quantised under ``--dense-format``, and their replacement in the model.

A pure function of shapes and names: the plan is made from config.json alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from offload.compute.dense import QuantizedEmbedding, QuantizedLinear
from offload.compute.matrix import MatrixLayout, QuantizedMatrix
from offload.compute.product import Products
from offload.model import transformers_api as api

_BITS = {"int8": 8, "int4": 4}
_DELICATE_BITS = 8
_DELICATE = frozenset({"v_proj", "down_proj"})
"""These, the head, and an embedding tied to it have no fewer bits than that: nothing averages their errors out. The
figures are in docs/developer.md."""
_MIN_ROWS, _MIN_COLUMNS = 16, 32
_SKINNY = 16
"""A linear layer with so many more inputs than outputs is a gate of some sort: it decides much and weighs little."""
_ROUTER_NAMES = frozenset({"gate", "shared_expert_gate", "wg"})
_PROJECTIONS = frozenset(
    {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "in_proj", "out_proj"}
)
"""No routers, though one of them may happen to have as many outputs as there are experts."""
_WEIGHT_IS_READ = frozenset({"dt_proj", "position_embedding"})
"""Model code computes with the weights of these itself (Jamba, vision towers)."""


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """A matrix that is held quantised, and the ``modules`` that share it (tied embeddings); the first gives its name.

    ``dtype`` is that of the native weights.
    """

    modules: tuple[str, ...]
    layout: MatrixLayout
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.modules[0]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the matrix stands for."""
        return tuple(f"{module}.weight" for module in self.modules)


def find_dense(
    model: PreTrainedModel, experts: Iterable[api.ExpertsModule], dense_format: str
) -> tuple[DenseMatrix, ...]:
    """The matrices of a meta model that ``dense_format`` quantises, in the model's order; none with ``native``.

    Linear layers and embeddings, but no routers, nothing tiny, and nothing whose class does more than the plain ones.
    """
    if dense_format not in _BITS:
        return ()
    found = _candidates(model, {module.num_experts for module in experts})
    owner_of = api.tied_weights(model)
    sharers: dict[str, list[str]] = {}  # parameters by the one that has the weights
    for parameter, owner in owner_of.items():
        sharers.setdefault(owner, [owner]).append(parameter)
    head = model.get_output_embeddings()
    matrices = []
    for path, module in found.items():
        parameter = f"{path}.weight"
        if parameter in owner_of:
            continue
        modules = tuple(name.removesuffix(".weight") for name in sharers.get(parameter, [parameter]))
        if all(name in found for name in modules):  # else a native module needs the native weights
            bits = _BITS[dense_format]
            if any(found[name] is head or name.rpartition(".")[2] in _DELICATE for name in modules):
                bits = max(bits, _DELICATE_BITS)
            rows, columns = module.weight.shape
            matrices.append(DenseMatrix(modules, MatrixLayout.make(rows, columns, bits), module.weight.dtype))
    return tuple(matrices)


def replace_dense(model: PreTrainedModel, dense: DenseMatrix, matrix: QuantizedMatrix, products: Products) -> None:
    """Put ``matrix`` in the place of the modules that ``dense`` names. Changes ``model``."""
    for path in dense.modules:
        module = model.get_submodule(path)
        new: torch.nn.Module
        if isinstance(module, torch.nn.Linear):
            new = QuantizedLinear(matrix, dense.dtype, products, module.bias)
        else:
            new = QuantizedEmbedding(matrix, dense.dtype, products, getattr(module, "scalar_embed_scale", None))
        api.replace_module(model, path, new)


def _candidates(model: PreTrainedModel, expert_counts: set[int]) -> dict[str, torch.nn.Linear | torch.nn.Embedding]:
    """Modules by path that may be quantised for themselves, whoever they share their weights with."""
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    dtype = ends[0].weight.dtype
    found: dict[str, torch.nn.Linear | torch.nn.Embedding] = {}
    for path, module in model.named_modules():
        if not (type(module) is torch.nn.Linear or _is_embedding(module)) or places[id(module)] > 1:
            continue
        assert isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        rows, columns = module.weight.shape
        parts = path.split(".")
        if rows < _MIN_ROWS or columns < _MIN_COLUMNS or not _WEIGHT_IS_READ.isdisjoint(parts):
            continue
        if module.weight.dtype != dtype and module not in ends:  # kept more exact than the rest: it is delicate
            continue
        if isinstance(module, torch.nn.Linear) and (
            columns >= _SKINNY * rows
            or any(part in _ROUTER_NAMES or part.startswith("router") for part in parts)
            or (rows in expert_counts and parts[-1] not in _PROJECTIONS)
        ):
            continue
        found[path] = module
    return found


def _is_embedding(module: torch.nn.Module) -> bool:
    """A plain embedding, or one of those that multiply their rows with a number and do nothing else (Gemma)."""
    if type(module) is torch.nn.Embedding:
        return True
    scaled = isinstance(module, torch.nn.Embedding) and hasattr(module, "scalar_embed_scale")
    return scaled and set(module._parameters) == {"weight"} and set(module._buffers) == {"embed_scale"}
