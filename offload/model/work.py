"""What a forward pass of a loaded model has to do, from its sizes."""

from __future__ import annotations

from transformers import PreTrainedModel

from offload.memory.activations import experts_per_token
from offload.memory.plan import ModelSizes
from offload.memory.work import Work, bits_per_weight
from offload.meter import RunLabels


def model_work(model: PreTrainedModel, sizes: ModelSizes, layers: int, labels: RunLabels) -> Work:
    """``layers`` are those with experts. The head counts for no token, since it runs for the last ones alone."""
    config = model.config.get_text_config()
    itemsize = model.dtype.itemsize
    dense = 8 * sizes.skeleton_bytes / bits_per_weight(labels.dense_format, itemsize)
    dense -= config.vocab_size * config.hidden_size
    routed = 8 * sizes.slot_bytes / bits_per_weight(labels.format, itemsize)
    routed *= layers * experts_per_token(model.config)
    return Work(sizes.skeleton_bytes, sizes.slot_bytes, 2 * (max(0.0, dense) + routed))
