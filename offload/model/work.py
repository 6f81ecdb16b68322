"""What a forward pass of a loaded model has to do, from its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from offload.compute.dense import QuantizedEmbedding, QuantizedLinear
from offload.memory.activations import experts_per_token
from offload.memory.plan import ModelSizes
from offload.memory.work import Work
from offload.model.transformers_api import ExpertsModule


def model_work(model: PreTrainedModel, sizes: ModelSizes, experts: Sequence[ExpertsModule]) -> Work:
    """``experts`` are those of all layers. Embeddings are looked up and not multiplied; the head counts for no token,
    since it runs for the last ones alone, but its bytes count for each pass.
    """
    config = model.config.get_text_config()
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    dense = sum(
        _multiplied(module)
        for module in model.modules()
        if module is not head and not isinstance(module, torch.nn.Embedding | QuantizedEmbedding)
    )
    routed = experts_per_token(model.config) * sum(
        math.prod(shape) for module in experts for shape, _ in module.tensors.values() if len(shape) > 1
    )
    looked_up = 0 if config.tie_word_embeddings else _bytes(embeddings)
    return Work(max(0, sizes.skeleton_bytes - looked_up), sizes.slot_bytes, 2 * (dense + routed))


def _multiplied(module: torch.nn.Module) -> int:
    """Weights of the matrices that belong to ``module`` itself."""
    if isinstance(module, QuantizedLinear):
        return module.in_features * module.out_features
    return sum(weight.numel() for weight in module.parameters(recurse=False) if weight.ndim > 1)


def _bytes(module: torch.nn.Module) -> int:
    if isinstance(module, QuantizedEmbedding):
        return module.matrix.layout.bytes
    return sum(weight.nbytes for weight in module.parameters(recurse=False))
