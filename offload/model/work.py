"""What a forward pass of a loaded model has to do, from its weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from transformers import PreTrainedModel

from offload.checkpoint.manifest import RecordLayout
from offload.compute.dense import QuantizedEmbedding, QuantizedLinear
from offload.memory.activations import experts_per_token
from offload.memory.plan import ModelSizes
from offload.memory.work import Work
from offload.model.transformers_api import ExpertsModule


def model_work(
    model: PreTrainedModel,
    sizes: ModelSizes,
    experts: Sequence[ExpertsModule],
    layout_of: Callable[[int], RecordLayout],
) -> Work:
    """``experts`` are those of all layers, whose records ``layout_of`` tells. Embeddings are looked up and not
    multiplied; the head counts for no token, since it runs for the last ones alone, but its bytes count for each pass.
    """
    config = model.config.get_text_config()
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    flops: Counter[int] = Counter()
    for module in model.modules():
        if module is not head and not isinstance(module, torch.nn.Embedding | QuantizedEmbedding):
            flops.update(dict(_multiplied(module)))
    for experts_module in experts:
        chosen = 2 * experts_per_token(model.config)
        kept = {tensor.name: _bits(tensor.dtype) for tensor in layout_of(experts_module.layer).tensors}
        for name, (shape, _) in experts_module.tensors.items():
            if len(shape) > 1:
                flops[kept.get(name, 0)] += chosen * math.prod(shape)
    looked_up = 0 if config.tie_word_embeddings else _bytes(embeddings)
    return Work(max(0, sizes.skeleton_bytes - looked_up), sizes.slot_bytes, dict(flops))


def _multiplied(module: torch.nn.Module) -> Iterable[tuple[int, int]]:
    """(bits, operations a token) of the matrices that belong to ``module`` itself."""
    if isinstance(module, QuantizedLinear):
        return [(module.matrix.layout.bits, 2 * module.in_features * module.out_features)]
    return [(0, 2 * sum(weight.numel() for weight in module.parameters(recurse=False) if weight.ndim > 1))]


def _bits(dtype: str) -> int:
    """Of a matrix in a record, by the name of its layout; 0 where the kernels for quantised weights do not take it."""
    return 4 if dtype.startswith("int4-g") else 8 if dtype == "int8" else 0


def _bytes(module: torch.nn.Module) -> int:
    if isinstance(module, QuantizedEmbedding):
        return module.matrix.layout.bytes
    return sum(weight.nbytes for weight in module.parameters(recurse=False))
