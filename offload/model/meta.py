"""Builds the whole model on the meta device: shapes and dtypes, no memory. Every module stands where it will run."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel

from offload.errors import ModelError
from offload.model import transformers_api as api
from offload.model.families.adapters import adapt_experts
from offload.model.families.known import DO_NOT_RUN, what_runs_instead
from offload.model.modalities import leave_out_modalities, other_modalities


def build_meta_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model that generates text for ``config``, with all its routed experts behind the experts interface.

    Raises ModelError if transformers has no such class for the config, or its experts cannot be reached.
    """
    name = config.model_type
    if name in DO_NOT_RUN:
        raise ModelError(f"{name} models cannot be run: {DO_NOT_RUN[name].reason}; {what_runs_instead(name)}")
    found = api.text_class(config)
    if found is None:
        raise ModelError(
            f"transformers has no text generation model for model_type '{name}'; {what_runs_instead(name)}"
        )
    try:
        model = api.construct(*found, dtype)
    except Exception as error:
        raise ModelError(f"config.json describes no {name} model: {error}") from error
    if other_modalities(model.config):
        leave_out_modalities(model)
    adapt_experts(model)
    if not api.find_experts(model):
        raise ModelError(
            f"model_type '{name}' has no routed experts that can be streamed, and only Mixture-of-Experts models are "
            f"run; {what_runs_instead(name)}"
        )
    api.apply_dtype_plan(model, dtype)
    return model
